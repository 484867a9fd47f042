"""anomalib: flows, students of frozen teachers, autoencoders, without pretrained weights."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch import LightningDataModule

from tests.modules.case import Case
from tests.modules.data import folder_until_exit, image, loader


@contextmanager
def _random_weights() -> Iterator[None]:
    """Lets timm make networks without their pretrained weights, where a class has no argument for that."""
    import timm

    create = timm.create_model

    def without(*names, **options):
        return create(*names, **{**options, "pretrained": False})

    with mock.patch("timm.create_model", without):
        yield


def _build(name, arguments):
    from anomalib.models import image as models

    none = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
    made = {key: value() if callable(value) else value for key, value in arguments.items()}
    return getattr(models, name)(**{**none, **made})


def _batches(size: int, batch_size: int = 2):
    def collate(images):
        from anomalib.data import ImageBatch

        count = len(images)
        return ImageBatch(
            image=torch.stack(images),
            gt_label=torch.arange(count) % 2 > 0,
            gt_mask=torch.zeros(count, size, size, dtype=torch.bool),
        )

    return loader(lambda at: image(size=size), 2 * batch_size, batch_size, collate)


@functools.cache
def _pictures() -> Path:
    """Writes pictures that a class takes other images from, where it would download a data set."""
    from PIL import Image

    folder = folder_until_exit()
    (folder / "class").mkdir()
    for at in range(4):
        Image.new("RGB", (64, 64), (at * 40, 100, 50)).save(folder / "class" / f"{at}.png")
    return folder


@functools.cache
def _teachers() -> Path:
    """Writes a teacher of random weights where EfficientAd looks for one that it would download."""
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel

    folder = folder_until_exit()
    (folder / "efficientad_pretrained_weights").mkdir()
    torch.manual_seed(5)
    teacher = EfficientAdModel(16, "small").teacher
    torch.save(teacher.state_dict(), folder / "efficientad_pretrained_weights" / "pretrained_teacher_small.pth")
    return folder


def _efficient_ad():
    from anomalib.models.image.efficient_ad import lightning_model

    lightning_model.get_pretrained_weights_dir = _teachers  # training starts with reading it
    return _build("EfficientAd", {"imagenet_dir": _pictures, "teacher_out_channels": 16, "model_size": "small"})


def _one_by_one():
    made = _batches(256, 1)

    class Data(LightningDataModule):
        train_batch_size = 1

        def train_dataloader(self):
            return made

        val_dataloader = train_dataloader

    return Data()


def _case(name, size, **arguments):
    return Case(
        "anomalib",
        name,
        partial(_build, name, arguments),
        partial(_batches, size),
        objects=True,
        around=_random_weights,
    )


CASES = [
    _case("Fastflow", 256, pre_processor=True, backbone="resnet18", pre_trained=False, flow_steps=2),
    _case("Ganomaly", 256, pre_processor=True, n_features=4, latent_vec_size=8),
    _case("Cflow", 64, backbone="resnet18", layers=["layer1", "layer2"], pre_trained=False, coupling_blocks=2),
    _case("Stfpm", 64, layers=["layer1", "layer2"]),
    _case("ReverseDistillation", 256, pre_processor=True, backbone="resnet18", pre_trained=False),
    _case("Draem", 64, dtd_dir=_pictures),
    Case("anomalib", "EfficientAd", _efficient_ad, _one_by_one, objects=True, by_hand=("model.teacher",)),
    _case("Supersimplenet", 256, pre_processor=True, backbone="resnet18", layers=["layer2", "layer3"]),
]
