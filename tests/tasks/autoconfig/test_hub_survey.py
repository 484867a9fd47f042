"""Data sets of Hugging Face `datasets` as DATA of `train`."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from lora_plugins.cli.main import main
from lora_plugins.tasks import DataError
from lora_plugins.tasks.autoconfig.found import LABELS, MASKS, Flags
from lora_plugins.tasks.autoconfig.hub_survey import hub_name
from lora_plugins.tasks.autoconfig.survey import survey

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("hf://datasets/ethz/food101", "ethz/food101"),
        ("hf://ethz/food101", "ethz/food101"),
        ("datasets:food", "food"),
        ("photos", None),
    ],
)
def test_what_is_a_data_set(data, name):
    assert hub_name(data) == name


@pytest.mark.parametrize("prefix", ["", "datasets:"])
def test_labels(labeled_rows, prefix):
    found = survey(f"{prefix}{labeled_rows}", Flags())
    assert (found.task, found.classes, dict(found.counts)) == (LABELS, ("cat", "dog"), {"train": 6, "val": 2})


@pytest.mark.parametrize("coded", [True, False], ids=["named", "texts"])
def test_classes_of_all_splits_and_those_that_are_not_validated_on(labeled_rows, tmp_path, coded):
    splits = datasets.load_from_disk(labeled_rows)
    names = ["cat", "dog", "owl"]
    feature = datasets.ClassLabel(names=names) if coded else datasets.Value("string")
    for split, values in {"train": [0, 0, 0, 1, 1, 1], "validation": [1, 2]}.items():
        labels = values if coded else [names[value] for value in values]
        splits[split] = splits[split].remove_columns("label").add_column("label", labels).cast_column("label", feature)
    splits.save_to_disk(tmp_path / "anew")
    found = survey(tmp_path / "anew", Flags())
    assert (found.classes, found.unmeasured) == (("cat", "dog", "owl"), ("cat",))


def test_masks(masked_rows):
    found = survey(masked_rows, Flags(ignore_index=0))
    assert (found.task, found.classes) == (MASKS, ("class_0", "class_1", "class_2"))
    assert found.arguments["mask_column"] == "annotation"
    assert found.arguments["reduce_labels"]
    assert found.size == (32, 32)


def test_parquet_without_a_val_split(labeled_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    datasets.load_from_disk(labeled_rows)["train"].to_parquet(tmp_path / "parquet" / "train.parquet")
    found = survey(f"datasets:{tmp_path / 'parquet'}", Flags(val_share=0.3))
    assert dict(found.counts) == {"train": 4, "val": 2}
    assert found.arguments["val_share"] == 0.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(classes=("a", "b")), "--classes and --ignore-index are for masks"),
        (Flags(val_share=0.5), "and these have one"),
    ],
    ids=["classes", "share"],
)
def test_flags_that_do_not_fit(labeled_rows, flags, message):
    with pytest.raises(DataError, match=message):
        survey(labeled_rows, flags)


def test_columns_without_images(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="has the columns 'text', and none of them holds images"):
        survey(tmp_path / "rows", Flags())


def test_no_network_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", "hf://datasets/nobody/nothing"]) == 1
    said = capsys.readouterr().err
    assert "nobody/nothing is on the Hugging Face hub, which cannot be reached from here." in said
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.*tensorboard.*")
def test_trained_to_the_end(labeled_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), "weights.safetensors")
    more = ["--model", "timm/test_vit", "--weights", "weights.safetensors", "--epochs", "1", "--device", "cpu"]
    assert main(["train", str(labeled_rows), *more]) == 0, capsys.readouterr().err
    assert "a data set with labels in 'label'" in capsys.readouterr().out
    assert (tmp_path / "runs" / "rows" / "adapter" / "adapter.json").is_file()
