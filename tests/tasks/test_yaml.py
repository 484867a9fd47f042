"""The shipped YAML files: each is parsed and run for two batches by the command line, on local data and weights."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_plugins.cli.main import main
from tests.slow import slow_but

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
    "cls_convnext": (
        "flat_folders",
        [
            "--model.init_args.model.name=convnext_atto",
            "--model.init_args.model.weights=none",
            "--data.init_args.image_size=[32,32]",
        ],
    ),
    "seg_deeplab": (
        "mask_folders",
        [
            "--model.init_args.model.weights=none",
            "--model.init_args.model.num_classes=3",
            "--data.init_args.classes=[a,b,c]",
            "--data.init_args.image_size=[64,64]",
            "--lora_callback.merge_on_fit_end=false",
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
MORE = ("cls_convnext", "seg_deeplab", "seg_smp")  # each of a task that others of FOLDERS train as well
HUB = {  # the file, the local data set in the hub's format, and what replaces the hub's model
    "food101_vit": (
        "labeled_rows",
        [
            "--model.init_args.model.name=vit",
            "--model.init_args.model.options={image_size: 16, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, "
            "num_attention_heads: 2, intermediate_size: 16}",
            "--model.init_args.model.num_classes=2",
            "--trainer.precision=32-true",
        ],
    ),
    "food101_dinov2g_qlora": (
        "labeled_rows",
        [
            "--model.init_args.model.name=vit_giant_patch14_dinov2",  # of two narrow blocks; the rest is as in the file
            "--model.init_args.model.options={img_size: 28, embed_dim: 96, depth: 2, num_heads: 2}",
            "--model.init_args.model.num_classes=2",
        ],
    ),
    "scene_parse_segformer": (
        "masked_rows",
        [
            "--model.init_args.model.name=segformer",
            "--model.init_args.model.options={hidden_sizes: [8, 8, 16, 16], depths: [1, 1, 1, 1], "
            "num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 16, mlp_ratios: [2, 2, 2, 2]}",
            "--data.init_args.image_size=[64,64]",
        ],
    ),
}
EMBEDDED = ("cls", "cls_qlora", "seg", "dreambooth")
METRICS = [
    ("cls", "accuracy"),
    pytest.param("cls_qlora", "accuracy", marks=pytest.mark.slow),
    pytest.param("seg", "mean_iou", marks=pytest.mark.slow),
]
EVERY = sorted({*FOLDERS, *HUB, *EMBEDDED})


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_every_file_is_run_here():
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_it_parses(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(TASKS / f"{name}.yaml"), "--print_config"])
    assert ended.value.code == 0
    assert "lora:" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in EMBEDDED if name != "dreambooth"])  # which has tests of its own
def test_embedded_data(name, capsys):
    assert main(["fit", "--config", str(TASKS / f"{name}.yaml"), *SHORT]) == 0
    check_outcome(name, capsys.readouterr().out)


@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_the_merged_model_is_a_file_of_weights_like_any_other(name, metric, capsys):
    config = ["--config", str(TASKS / f"{name}.yaml")]
    main(["fit", *config, *SHORT])
    fitted = number_in(metric, capsys.readouterr().out)
    weights = f"--model.init_args.model.weights=runs/{name}/merged.safetensors"
    main(["validate", *config, weights, "--lora=null", "--trainer.accelerator=cpu"])
    assert number_in(metric, capsys.readouterr().out) == pytest.approx(fitted, abs=1e-3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # each fit has a log folder of its own
@pytest.mark.parametrize(("name", "metric"), METRICS)
def test_a_checkpoint_goes_on_in_every_command(name, metric, capsys):
    config = ["--config", str(TASKS / f"{name}.yaml"), "--trainer.accelerator=cpu"]
    main(["fit", *config, *SHORT])
    fitted = number_in(metric, capsys.readouterr().out)
    (path,) = Path("runs", name).glob("logs/*/checkpoints/*.ckpt")
    checkpoint = f"--ckpt_path={path}"
    assert main(["validate", *config, checkpoint]) == 0
    assert number_in(metric, capsys.readouterr().out) == pytest.approx(fitted, abs=1e-3)
    assert main(["fit", *config, *SHORT, "--trainer.max_epochs=2", checkpoint]) == 0


def number_in(metric, printed):
    """The last number in the row of a metric, in a table of ours or of Lightning."""
    (row,) = [line for line in printed.splitlines() if metric in line]
    return float(re.findall(r"\d+\.\d+", row)[-1])


@pytest.mark.parametrize("name", slow_but(FOLDERS, FOLDERS.keys() - MORE))
def test_data_on_disk(name, request, capsys):
    data, changes = FOLDERS[name]
    root = f"--data.init_args.root={request.getfixturevalue(data)}"
    assert main(["fit", "--config", str(TASKS / f"{name}.yaml"), *SHORT, root, *changes]) == 0
    check_outcome(name, capsys.readouterr().out)


@pytest.mark.parametrize("name", slow_but(HUB, ["scene_parse_segformer"]))
def test_data_of_the_hub(name, request, capsys):
    pytest.importorskip("datasets")
    data, changes = HUB[name]
    half = [f"--model.init_args.model.{key}=[0.5,0.5,0.5]" for key in ("mean", "std")]
    local = [f"--data.init_args.name={request.getfixturevalue(data)}", "--data.init_args.num_workers=0"]
    local += ["--model.init_args.model.weights=none", *half]
    assert main(["fit", "--config", str(TASKS / f"{name}.yaml"), *SHORT, *local, *changes]) == 0
    check_outcome(name, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "model", "trained"),
    [("food101_vit", "vit", "667,493 of"), ("scene_parse_segformer", "segformer", "566,422 of")],
    ids=["food101_vit", "scene_parse_segformer"],
)
def test_as_many_parameters_are_trained_as_in_the_guide(name, model, trained, capsys):
    """In the networks of full size, whose shape the names of the types stand for; the guides print these numbers."""
    half = [f"--model.init_args.model.{key}=[0.5,0.5,0.5]" for key in ("mean", "std")]
    random = [f"--model.init_args.model.name={model}", "--model.init_args.model.weights=none", *half]
    assert main(["plan", "--config", str(TASKS / f"{name}.yaml"), *random, "--trainer.precision=32-true"]) == 0
    assert trained in capsys.readouterr().out


def test_plan_shows_what_the_task_chooses(flat_folders, capsys):
    """cls_convnext names no target_modules."""
    _, changes = FOLDERS["cls_convnext"]
    config = ["--config", str(TASKS / "cls_convnext.yaml"), f"--data.init_args.root={flat_folders}", *changes]
    assert main(["plan", *config]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("fc1", "fc2", "stem.0"))
    assert "conv_dw" not in printed
    assert main(["plan", *config, "--lora.target_modules=[fc1]"]) == 0
    assert "fc2" not in capsys.readouterr().out


def check_outcome(name, printed):
    folder = Path("runs") / name
    assert (folder / "adapter").is_dir()
    assert not any("lora" in key for key in load_file(folder / "merged.safetensors"))
    assert ("predictions.png" in printed) == (folder / "predictions.png").is_file()
    assert ("report.html" in printed) == (folder / "report.html").is_file()
    assert ("Metrics on val" in printed) or (folder / "report.html").is_file()
    assert list(folder.glob("logs/*/events.out.*"))
    assert list(folder.parent.iterdir()) == [folder]
