"""Commands whose reader goes away end quietly; other pipes that break are errors."""

import os
import subprocess
import sys

import pytest

from lora_plugins.cli import exit_on_closed_output


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


def test_output_that_is_read_is_whole(capfd):
    assert exit_on_closed_output(lambda: print("all of it") or 3)() == 3
    assert capfd.readouterr().out == "all of it\n"
