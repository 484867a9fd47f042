"""The commands of the tasks beside those of Lightning."""

import subprocess
import sys

import pytest

from lora_plugins.cli.main import main
from lora_plugins.tasks.command_table import COMMANDS
from tests.core.processes import assert_answered_without


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "no_adapter", "photos"], "There is no no_adapter. Give a checkpoint, an adapter folder"),
        (["predict", "--out", "seen", "no_adapter", "photos"], "There is no no_adapter. Give a checkpoint"),
        (["predict", "--config", "no.yaml"], "There is no file no.yaml"),
        (["--config", "no.yaml", "predict"], "There is no file no.yaml"),
        (["export", "no_adapter", "out.onnx"], "There is no no_adapter. Give a checkpoint, an adapter folder"),
        (["export", "no.ckpt", "out.safetensors", "--model", "no.such.Class"], "there is no module 'no"),
    ],
    ids=[
        "predict paths",
        "flags before the paths",
        "predict flags",
        "flags before predict",
        "export a path",
        "export of a class",
    ],
)
def test_paths_are_for_the_tasks_and_flags_for_lightning(arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_slip_in_a_path_is_told_where_it_is(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "photos" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main([command, "runs/photo/adapter", "out.onnx"]) == 1
    assert f"{tmp_path / 'runs'} has no 'photo'. Did you mean 'photos'?" in capsys.readouterr().err


def test_onnx_that_cannot_be_written_is_said_first(monkeypatch, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(tmp_path / "model.safetensors"), str(tmp_path / "model.onnx")]) == 1
    assert "ONNX needs 'onnxruntime'. Run: pip install onnxruntime. A .pt2 file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("it.ckpt", "it.ckpt is no checkpoint, or is cut off"),
        ("it.safetensors", "it.safetensors is no safetensors file, or is cut off"),
        ("it.jpg", "it.jpg is no model, which comes first"),
        ("it", "it is no adapter folder: it has no adapter.json"),
    ],
)
def test_what_no_task_is_in_is_seen_from_its_first_bytes(tmp_path, monkeypatch, name, said):
    """Before torch is imported, which this process may have done already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("nothing") if "." in name else (tmp_path / name).mkdir()
    code = "import sys; from lora_plugins.cli.main import main; code = main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"{code}; sys.exit(code)", "predict", name, "a.jpg"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert f"error: {said}" in run.stderr


def test_a_file_of_no_kind_is_not_exported(tmp_path, capsys):
    assert main(["export", str(tmp_path), "m.tflite"]) == 1
    assert "The file to write is 'm.tflite'. It ends in one of .pt2, .onnx, .safetensors." in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "usage"), [(["predict", "m", "i", "-h"], "MODEL"), (["export", "-h"], "export")])
def test_help(arguments, usage, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert usage.lower() in capsys.readouterr().out


def test_help_and_mistakes_do_not_wait_for_libraries(tmp_path):
    """They take seconds to import, and the answers need none of them."""
    (tmp_path / "adapter.json").touch()
    lines = [
        *(f"{command} --help" for command in COMMANDS),
        "train no_photos",
        "train photos --epoch 3",
        "train photos --lr abc",
        f"train photos --out {sys.executable}",
        "train hf://datasets/no/data",
        "fit --config no.yaml",
        "fit --epochs 0",
        "predict no_adapter photos",
        f"predict {tmp_path} no_photos",
        f"predict {tmp_path} {tmp_path}",
        "export no_adapter out.onnx",
        "serve adapters --batch 0",
        "report compare one",
        "recipes show no",
    ]
    assert_answered_without(("torch", "numpy", "lightning", "timm"), lines, HF_HUB_OFFLINE="1")


def test_predict_explains_images_first_and_its_flags_on_demand(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "images, folders of images, or patterns" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [("finetune", "'train'"), ("infer", "'predict'"), ("evaluate", "'validate'"), ("compare", "'report compare'")],
)
def test_what_other_programs_call_a_command(name, said, capsys):
    assert main([name]) == 1
    assert capsys.readouterr().err == f"error: there is no command {name!r}. It is {said} here.\n"
