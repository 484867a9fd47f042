"""The commands of the tasks beside those of Lightning."""

import subprocess
import sys

import pytest

from lora_plugins.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "no_adapter", "photos"], "There is no no_adapter. Give a checkpoint, an adapter folder"),
        (["predict", "--config", "no.yaml"], "There is no file no.yaml"),
        (["--config", "no.yaml", "predict"], "There is no file no.yaml"),
        (["export", "no_adapter", "out.onnx"], "There is no no_adapter. Give a checkpoint, an adapter folder"),
        (["export", "no.ckpt", "out.safetensors", "--model", "no.such.Class"], "there is no module 'no"),
    ],
    ids=["predict paths", "predict flags", "flags before predict", "export a path", "export of a class"],
)
def test_paths_are_for_the_tasks_and_flags_for_lightning(arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "usage"), [(["predict", "m", "i", "-h"], "MODEL"), (["export", "-h"], "export")])
def test_help(arguments, usage, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert usage.lower() in capsys.readouterr().out


def test_the_table_is_cheap():
    code = "import sys, lora_plugins.tasks.command_table; print({'lightning', 'timm', 'PIL'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
