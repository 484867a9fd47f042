"""The command `serve`: what it refuses before anything is served."""

import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from lora_plugins.cli import TERMINATED
from lora_plugins.cli.main import main


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "99999"),
        ("--port", "0"),
        ("--port", "-1"),
        ("--port", "http"),
        ("--wait", "-1"),
        ("--wait", "nan"),
        ("--wait", "1e300"),
        ("--wait", "long"),
        ("--max-mb", "0"),
        ("--max-mb", "1e308"),
        ("--loaded", "0"),
        ("--batch", "0"),
    ],
)
def test_a_number_out_of_range_is_named(tmp_path, capsys, flag, value):
    (tmp_path / "photos").mkdir()
    assert main(["serve", str(tmp_path), f"{flag}={value}"]) == 1
    assert f"argument {flag}: " in (told := capsys.readouterr().err)
    assert repr(value) in told


def test_the_command_names_a_missing_folder(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_a_folder_without_adapters_is_not_served(tmp_path):
    (tmp_path / "photos").mkdir()
    lines = f"import sys; from lora_plugins.cli.main import main; code = main(['serve', {str(tmp_path)!r}])"
    command = [sys.executable, "-c", f"{lines}; raise SystemExit(code if 'torch' not in sys.modules else 'late')"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: There is no adapter in {tmp_path}")
    assert "late" not in ended.stderr


def test_a_port_that_is_taken_is_named(adapters, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(adapters), "--port", str(port)]) == 1
    assert f"error: nothing can be served at --host 127.0.0.1 --port {port}." in capsys.readouterr().err


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_the_address_is_one_that_a_browser_takes(adapters, capsys, monkeypatch, host, shown):
    monkeypatch.setattr("uvicorn.run", lambda app, **served: None)
    assert main(["serve", str(adapters), "--host", host, "--port", "8123"]) == 0
    assert capsys.readouterr().out.endswith(f": http://{shown}:8123/docs\n")


@pytest.mark.slow
def test_sigterm_is_no_port_that_is_taken(adapters):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "lora_plugins", "serve", str(adapters), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while process.poll() is None:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (TERMINATED, "Ended by SIGTERM.\n")
