"""What the tests of the tasks share: tiny models, a quiet Trainer, and data sets written to disk."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback, Trainer
from PIL import Image

from lora_plugins.tasks import DigitScenesDataModule, DigitsDataModule, ModelConfig

TINY_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY_SEGFORMER = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "mlp_ratios": [2, 2, 2, 2],
}
HALF = (0.5, 0.5, 0.5)
SIZE = {"image_size": (8, 8)}


LIGHTNING_WARNINGS = [
    "ignore:.*does not have many workers:UserWarning",  # data in memory has no use for worker processes
    "ignore:The number of training batches:UserWarning",  # shorter than the logging interval, on purpose
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # lightning 2.6.6 calls what 5.0 will drop
    "ignore:.*configure_optimizers` will be overridden by:UserWarning",  # by the `optimizer:` of a YAML file, as meant
    "ignore:Found .* module.s. in eval mode at the start of training:UserWarning",  # LoRA holds normalization there
    "ignore:GPU available but not used:UserWarning",
]


def pytest_collection_modifyitems(items):
    """Warnings of Lightning itself that are no concern of these tests."""
    for item in items:
        if "tests/tasks" in str(item.path):
            for warning in LIGHTNING_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def digits(**changes):
    return DigitsDataModule(**({"digits": [0, 1, 2]} | changes))


def scenes(**changes):
    """A few scenes of three digits."""
    small = {"digits": [1, 2, 3], "train_scenes": 4, "val_scenes": 3, "batch_size": 2}
    return DigitScenesDataModule(**small | changes)


def tiny_vit(num_classes=3, weights="none", **changes):
    """A vision transformer of timm with a few thousand parameters."""
    return ModelConfig("timm", "vit_tiny_patch16_224", num_classes, weights, TINY_VIT | changes)


def tiny_segformer(num_classes=4, weights="none", **changes):
    """A SegFormer of transformers with a few thousand parameters."""
    return ModelConfig("transformers", "segformer", num_classes, weights, TINY_SEGFORMER | changes, HALF, HALF)


def loaded(data):
    """A data module that is set up."""
    data.setup("fit")
    return data


def written(path, rows):
    """The path of a list of samples, CSV or JSON lines, as it was written."""
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


class Recorder(Callback):
    """Keeps what the network says of every validation batch."""

    def __init__(self):
        self.predicted, self.true, self.losses = [], [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        images, targets = (batch["image"], batch["target"]) if isinstance(batch, dict) else batch
        self.predicted.append(pl_module(images).argmax(1))
        self.true.append(targets)


def unet(num_classes=3, weights="none", decoder="Unet", **options):
    """A U-Net of smp over a tiny encoder of timm."""
    small = {"encoder_name": "tu-test_resnet", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    return ModelConfig("smp", decoder, num_classes, weights, small | options)


@pytest.fixture
def trainer(tmp_path):
    """A function that makes a Trainer without bars, logs and files."""

    def make(**arguments):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
        return Trainer(**({"max_epochs": 1, "num_sanity_val_steps": 0} | quiet | arguments))

    return make


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """Writes pixels as a picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(height=20, width=24, seed=0):
    """A color picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def class_folders(tmp_path):
    """An image data set of two classes, four training and two validation images each."""
    for turn, (split, count) in enumerate({"train": 4, "val": 2}.items()):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(tmp_path / "data" / split / name / f"{i}.jpg", noise(seed=(100 * label + i, turn)))
    return tmp_path / "data"


@pytest.fixture
def mask_folders(tmp_path):
    """Images with masks of three classes and 255 in one corner, four to train on and two to validate on."""
    for turn, (split, count) in enumerate({"train": 4, "val": 2}.items()):
        for i in range(count):
            mask = np.random.default_rng(i).integers(0, 3, (20, 24), dtype=np.uint8)
            mask[:4, :4] = 255
            write_image(tmp_path / "data" / "images" / split / f"{i}.jpg", noise(seed=(i, turn)))
            write_image(tmp_path / "data" / "masks" / split / f"{i}.png", mask)
    return tmp_path / "data"


@pytest.fixture
def flat_folders(tmp_path):
    """An image data set of two classes with five images each, to be split."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(5):
            write_image(tmp_path / "data" / name / f"{i}.jpg", noise(seed=100 * label + i))
    return tmp_path / "data"


@pytest.fixture
def labeled_rows(tmp_path):
    """A local data set of Hugging Face: six images of two named classes to train on, and two to validate on."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as Picture

    features = Features({"image": Picture(), "label": ClassLabel(names=["cat", "dog"])})
    splits = {}
    for turn, (split, count) in enumerate({"train": 6, "validation": 2}.items()):
        images = [Image.fromarray(noise(seed=(i, turn))) for i in range(count)]
        splits[split] = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(count)]}, features=features)
    DatasetDict(splits).save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def masked_rows(tmp_path):
    """Likewise, with masks that write "no class" as 0 and class i as i + 1."""
    from datasets import Dataset, DatasetDict, Features
    from datasets import Image as Picture

    features = Features({"image": Picture(), "annotation": Picture()})
    splits = {}
    for turn, (split, count) in enumerate({"train": 4, "validation": 2}.items()):
        images = [Image.fromarray(noise(seed=(i, turn))) for i in range(count)]
        masks = [np.random.default_rng(i).integers(0, 4, (20, 24), dtype=np.uint8) for i in range(count)]
        rows = {"image": images, "annotation": [Image.fromarray(mask) for mask in masks]}
        splits[split] = Dataset.from_dict(rows, features=features)
    DatasetDict(splits).save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"
