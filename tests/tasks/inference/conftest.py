"""The files of fits."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.integrations.lightning.cli import merge_checkpoint
from lora_plugins.tasks import (
    DigitsDataModule,
    ImageClassificationTask,
    SemanticSegmentationTask,
)
from lora_plugins.tasks.models import CLASSIFIERS, SEGMENTERS, build_network

from ..conftest import scenes, tiny_segformer, tiny_vit

FILES = {
    "checkpoint": "run/it.ckpt",
    "adapter": "adapter",
    "merged": "merged.safetensors",
    "merged checkpoint": "merged.ckpt",
}


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """The files of a fit, and the fitted task, by kind of task."""
    return {kind: fit(kind, tmp_path_factory.mktemp(kind)) for kind in ("labels", "masks")}


def fit(kind, folder, **stored):
    """The fitted task, and its files."""
    make, sources, tiny, data = {
        "labels": (ImageClassificationTask, CLASSIFIERS, tiny_vit, DigitsDataModule([0, 1, 2])),
        "masks": (SemanticSegmentationTask, SEGMENTERS, tiny_segformer, scenes()),
    }[kind]
    torch.manual_seed(0)
    save_file(build_network(tiny(), sources).module.state_dict(), folder / "base.safetensors")
    # Balanced, so that not all of a mask is the ground.
    task = make(tiny(weights=str(folder / "base.safetensors")), lr=1e-2, class_weights="balanced")
    head = "head" if kind == "labels" else "decode_head.classifier"
    files = fit_task(task, data, folder, head, **stored)
    merge_checkpoint(make, folder / "run" / "it.ckpt", folder / "merged.ckpt")
    return task.eval(), files


def fit_task(task, data, folder, head, **stored):
    """The files of a fit of a task."""
    from lightning.pytorch import Trainer

    lora = LoraCallback(
        LoraConfig(r=2, modules_to_save=[head], **stored),
        target="network",
        save_adapter_to=str(folder / "adapter"),
        export_to=str(folder / "merged.safetensors"),
        dequantize=bool(stored),
        print_plan=False,
    )
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[lora, ModelCheckpoint(folder / "run", filename="it")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, datamodule=data)
    return {name: folder / file for name, file in FILES.items()}
