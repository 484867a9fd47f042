"""Commands whose reader goes away end quietly; other pipes that break are errors."""

import io
import os
import subprocess
import sys

import pytest

from lora_plugins.cli import exit_on_closed_output
from lora_plugins.cli.pipes import print_any_text


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["plugins"], ["--help"]], ids=" ".join)
def test_a_command_ends_quietly_when_its_reader_goes_away(arguments, unbuffered):
    """The reader is gone before the first line, as under `| head -0`."""
    numpy = "ignore:Failed to initialize NumPy"  # torch's warning, where it is not installed
    command = [sys.executable, "-W", numpy, "-m", "lora_plugins", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(timeout=120), errors) == (1, "")


def test_a_broken_pipe_to_somebody_else_is_an_error(capfd):
    @exit_on_closed_output
    def command():
        raise BrokenPipeError("of a process that loads data")

    with pytest.raises(BrokenPipeError, match="loads data"):
        command()


@pytest.mark.parametrize("arguments", [["plugins"], ["--help"]], ids=" ".join)
def test_a_command_without_an_output(arguments):
    """As under `>&-`, and in services: `sys.stdout` is None."""
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-m", "lora_plugins", *arguments]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_text_that_the_encoding_of_the_output_lacks(monkeypatch):
    """As in a file on Windows; other errors than `strict` are a choice, and stay."""
    for errors, expected in (("strict", b"caf\\xe9"), ("surrogateescape", b"caf\\xe9"), ("replace", b"caf?")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors))
        print_any_text()
        print("caf\xe9", end="", flush=True)
        assert sys.stdout.buffer.getvalue() == expected


def test_output_that_is_read_is_whole(capfd):
    assert exit_on_closed_output(lambda: print("all of it") or 3)() == 3
    assert capfd.readouterr().out == "all of it\n"
