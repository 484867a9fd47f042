"""The files of a folder, by names that can be printed."""

import os
import subprocess
import sys


def test_names_that_the_locale_cannot_read(tmp_path):
    """The files are right, and need no other names."""
    (tmp_path / "caf\xe9").mkdir()
    code = "import pathlib, sys; from lora_plugins.tasks.files import subfolders; subfolders(pathlib.Path(sys.argv[1]))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    run = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, text=True, check=False)
    assert "Names of files and folders are read as ascii here" in run.stderr
    assert "Set PYTHONUTF8=1" in run.stderr
