"""The shipped YAML files: each is parsed and run for two batches by the command line, on local data and weights."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_plugins.integrations.lightning.main import main

TASKS = Path(str(files("lora_plugins.tasks")))
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
SHORT += ["--trainer.enable_progress_bar=false"]
FOLDERS = {  # the file, the data it runs on, and what replaces the hub
    "cls_folder": ("class_folders", ["--model.init_args.model.weights=none"]),
    "seg_folder": (
        "mask_folders",
        [
            "--model.init_args.model.weights=none",
            "--model.init_args.model.name=segformer",
            "--model.init_args.model.mean=[0.5,0.5,0.5]",
            "--model.init_args.model.std=[0.5,0.5,0.5]",
            "--model.init_args.model.num_classes=3",
            "--data.init_args.classes=[a,b,c]",
            "--data.init_args.image_size=[64,64]",
        ],
    ),
    "seg_smp": (
        "mask_folders",
        [
            "--model.init_args.model.weights=none",
            "--model.init_args.model.num_classes=3",
            "--data.init_args.classes=[a,b,c]",
            "--data.init_args.image_size=[64,64]",
        ],
    ),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_every_file_is_run_here():
    assert {path.stem for path in TASKS.glob("*.yaml")} == {*FOLDERS, "cls", "seg"}


@pytest.mark.parametrize("name", sorted({*FOLDERS, "cls", "seg"}))
def test_it_parses(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(TASKS / f"{name}.yaml"), "--print_config"])
    assert ended.value.code == 0
    assert "target_modules" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cls", "seg"])
def test_embedded_data(name, capsys):
    assert main(["fit", "--config", str(TASKS / f"{name}.yaml"), *SHORT]) == 0
    check_outcome(name, capsys.readouterr().out)


@pytest.mark.parametrize(("name", "metric"), [("cls", "accuracy"), ("seg", "mean_iou")])
def test_the_merged_model_is_a_file_of_weights_like_any_other(name, metric, capsys):
    config = ["--config", str(TASKS / f"{name}.yaml")]
    main(["fit", *config, *SHORT])
    fitted = number_in(metric, capsys.readouterr().out)
    weights = f"--model.init_args.model.weights=runs/{name}/merged.safetensors"
    main(["validate", *config, weights, "--lora=null", "--trainer.accelerator=cpu"])
    assert number_in(metric, capsys.readouterr().out) == pytest.approx(fitted, abs=1e-3)


def number_in(metric, printed):
    """The last number in the row of a metric, in a table of ours or of Lightning."""
    (row,) = [line for line in printed.splitlines() if metric in line]
    return float(re.findall(r"\d+\.\d+", row)[-1])


@pytest.mark.parametrize("name", FOLDERS)
def test_data_on_disk(name, request, capsys):
    data, changes = FOLDERS[name]
    root = f"--data.init_args.root={request.getfixturevalue(data)}"
    assert main(["fit", "--config", str(TASKS / f"{name}.yaml"), *SHORT, root, *changes]) == 0
    check_outcome(name, capsys.readouterr().out)


def check_outcome(name, printed):
    folder = Path("runs") / name
    assert (folder / "adapter").is_dir()
    assert not any("lora" in key for key in load_file(folder / "merged.safetensors"))
    assert ("predictions.png" in printed) == (folder / "predictions.png").is_file() == name.startswith("seg")
    assert "Metrics on val" in printed
    assert list(folder.parent.iterdir()) == [folder]
