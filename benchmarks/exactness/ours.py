"""lora_plugins, as a user meets it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from benchmarks.exactness.reference import Update, expected_layers, weights_of
from lora_plugins import LoraConfig, LoraModel
from lora_plugins.plugins import Storage, storage_options
from lora_plugins.storages.nf4 import NF4Storage

ADAPTER = "default"
CONFIG = LoraConfig(r=2, alpha=3, init="none", target_modules="all")
NF4 = Storage(NF4Storage(), storage_options(NF4Storage(), {"min_size": 0}))
SUFFIXES = {"in_proj_weight": "", "q_proj_weight": "_q", "k_proj_weight": "_k", "v_proj_weight": "_v"}
"""What follows `lora_A` for weights of attention; in other layers, the same follows `weight`."""


class Ours:
    """The library of this repository; it is held to every check, on every layer."""

    name: ClassVar[str] = "lora_plugins"
    skipped: ClassVar[Mapping[str, str]] = {}

    def prepare(self, model: nn.Module) -> None:
        """Nothing: the base stays as it is."""

    def adapts(self, layer: nn.Module) -> bool:
        """Every layer."""
        return True

    def adapt(self, model: nn.Module) -> "OurAdapted":
        """Adapts everything that some plugin handles."""
        return OurAdapted(model, LoraModel(model, CONFIG))

    def load(self, model: nn.Module, folder: Path) -> "OurAdapted":
        """Loads an adapter folder."""
        return OurAdapted(model, LoraModel.load_adapter(model, folder))


@dataclass(frozen=True)
class OurAdapted:
    """A model and the handle to its adapters."""

    model: nn.Module
    handle: LoraModel

    def updates(self) -> Sequence[Update]:
        """Reads A and B where they stand in the layers, those of tied weights once; the scaling is `alpha / r`."""
        found: dict[int, Update] = {}
        for name, layer in expected_layers(self.model):
            for tensor in weights_of(layer):
                suffix = SUFFIXES.get(tensor, tensor.removeprefix("weight"))
                if f"lora_A{suffix}" in layer._modules:
                    A, B = (layer._modules[f"lora_{factor}{suffix}"][ADAPTER] for factor in "AB")
                    found.setdefault(id(A), Update(name, tensor, A, B, CONFIG.alpha / CONFIG.r))
        return list(found.values())

    def merge(self) -> None:
        """Merges, to be undone."""
        self.handle.merge_adapter()

    def unmerge(self) -> None:
        """Undoes `merge`."""
        self.handle.unmerge_adapter()

    def unload(self) -> nn.Module:
        """Removes the adapter."""
        return self.handle.unload()

    def fold(self) -> nn.Module:
        """Merges for good."""
        return self.handle.merge_and_unload()

    def save(self, folder: Path) -> None:
        """Writes the adapter."""
        self.handle.save_adapter(folder)


class OursOnNF4(Ours):
    """The same on a base that is stored in 4 bits; it has to equal the model whose weights are what is stored.

    All weights are stored, small ones too, except those that something computes, which no storage takes.
    """

    name: ClassVar[str] = "lora_plugins on nf4"

    def prepare(self, model: nn.Module) -> None:
        """Rounds the weights to values that 4 bits hold; stored again, they do not change."""
        with torch.no_grad():
            for parameter in {id(p): p for _, p in _storable(model)}.values():
                parameter.copy_(NF4.rounded(parameter))

    def adapt(self, model: nn.Module) -> "OurAdapted":
        """Adapts everything that some plugin handles, and stores it."""
        stored = {name: None for name, _ in _storable(model)}
        if not stored:  # something computes every weight, as in models with weight norm alone
            return super().adapt(model)
        config = replace(
            CONFIG,
            quantize=NF4.plugin.name,
            quantize_options={"min_size": 0},
            quantize_modules="|".join(re.escape(name) for name in stored),  # a list would match longer names too
        )
        return OurAdaptedOnNF4(model, LoraModel(model, config))

    def load(self, model: nn.Module, folder: Path) -> "OurAdapted":
        """Loads an adapter folder, which stores the base."""
        return OurAdaptedOnNF4(model, LoraModel.load_adapter(model, folder))


@dataclass(frozen=True)
class OurAdaptedOnNF4(OurAdapted):
    """A model with stored weights and the handle to its adapters."""

    def unload(self) -> nn.Module:
        """Removes the adapter, and gives the float model of what is stored."""
        return self.handle.unload(dequantize=True)

    def fold(self) -> nn.Module:
        """Merges for good into float weights."""
        return self.handle.merge_and_unload(dequantize=True)


def _storable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the weights that are parameters of their own, each with the name of its layer."""
    for name, layer in expected_layers(model):
        for parameter in (layer._parameters.get(tensor) for tensor in weights_of(layer)):
            if parameter is not None:
                yield name, parameter
