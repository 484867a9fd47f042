"""`lora-plugins new-plugin`: the package it writes is installed, and passes its own tests as it was written."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_plugins.cli.main import main
from lora_plugins.testing import INIT_CHECKS, LAYER_CHECKS
from lora_plugins.testing.full_disk import no_file_beyond
from tests.core.processes import run_tests


def test_its_own_tests_pass_as_generated(tmp_path, capsys):
    assert main(["new-plugin", "two-words", "--into", str(tmp_path)]) == 0
    folder = tmp_path / "lora-plugins-two-words"
    assert f"Wrote {folder}" in capsys.readouterr().out
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(tmp_path / "site"), str(folder)], check=True)
    assert f"{len(LAYER_CHECKS) + len(INIT_CHECKS) + 2} passed" in run_tests(folder, tmp_path / "site")


def test_no_placeholder_is_left(tmp_path):
    main(["new-plugin", "mine", "--into", str(tmp_path)])
    files = [path for path in (tmp_path / "lora-plugins-mine").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "pyproject.toml", "README.md", "__init__.py", "layers.py", "inits.py", "test_plugin.py",
    }  # fmt: skip
    assert [path for path in files if "$" in path.read_text()] == []


@pytest.mark.parametrize("name", ["", "My", "1st", "a_b", "a--b", "-a", "a-", "a b", "../a", "é"])
def test_a_bad_name_is_refused(tmp_path, capsys, name):
    assert main(["new-plugin", "--into", str(tmp_path), "--", name]) == 1
    assert f"{name!r} cannot name a plugin" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "kind"), [("pissa", "init"), ("linear", "layer type")])
def test_a_taken_name_is_refused_with_its_owner(tmp_path, capsys, name, kind):
    assert main(["new-plugin", name, "--into", str(tmp_path)]) == 1
    assert f"The {kind} '{name}' is taken, by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_kept(tmp_path, capsys):
    (tmp_path / "lora-plugins-mine").mkdir()
    assert main(["new-plugin", "mine", "--into", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "lora-plugins-mine").iterdir()) == []


def test_a_full_disk_is_told_of_the_package(tmp_path, capsys):
    with no_file_beyond(100):
        assert main(["new-plugin", "mine", "--into", str(tmp_path)]) == 1
    assert f" for {tmp_path / 'lora-plugins-mine'}. Make room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder that nobody can write into")
def test_a_folder_that_cannot_be_written_is_refused(capsys):
    assert main(["new-plugin", "my-layer", "--into", "/proc/self"]) == 1
    assert "nothing can be written in /proc/self" in capsys.readouterr().err


def test_a_missing_folder_is_refused(tmp_path, capsys):
    assert main(["new-plugin", "mine", "--into", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
