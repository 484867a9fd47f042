"""`python -m lora_plugins.tasks COMMAND`."""

import subprocess
import sys

import pytest

from lora_plugins.tasks.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_arguments(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m lora_plugins.tasks {command}" in capsys.readouterr().out


def test_help_lists_all_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m lora_plugins.tasks COMMAND"),
        (["compar"], "unknown command 'compar'. Did you mean 'compare'"),
    ],
    ids=["nothing", "an unknown command"],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_in_a_shell():
    command = [sys.executable, "-P", "-m", "lora_plugins.tasks", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: python -m lora_plugins.tasks")
