"""Adapter folders of tasks with random weights, as fits leave them: a server does not ask how they were trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.files import PackedAdapter, read, write
from lora_plugins.tasks.models import ModelConfig, build_network
from lora_plugins.tasks.training import PROVENANCE_KEY, VisionTask


def write_base(kind: type[VisionTask], model: ModelConfig, path: Path) -> ModelConfig:
    """Writes a network with random weights, and returns the configuration that reads it."""
    torch.manual_seed(0)
    save_file(build_network(model, kind.sources).module.state_dict(), path)
    return replace(model, weights=str(path))


def write_adapters(
    kind: type[VisionTask], model: ModelConfig, folder: Path, names: Sequence[str], **fields: Any
) -> None:
    """Writes an adapter of a base of `write_base` for each name, with a head of its own if it trains one."""
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        task = kind(model)
        lora = LoraModel(task.network, LoraConfig(**{"init": "none", **fields}))
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        lora.save_adapter(folder / name)
        add_provenance(folder / name, {**task.provenance(), "target": "network"})


def add_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Adds to an adapter folder which task its model is of."""
    packed = read(folder)
    write(folder, PackedAdapter({**packed.manifest, PROVENANCE_KEY: provenance}, packed.tensors))
