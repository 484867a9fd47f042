"""lora_plugins, as a user meets it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from benchmarks.exactness.reference import Update, weights_of
from lora_plugins import LoraConfig, LoraModel

ADAPTER = "default"
CONFIG = LoraConfig(r=2, alpha=3, init="none", target_modules="all")
SUFFIXES = {"q_proj_weight": "_q", "k_proj_weight": "_k", "v_proj_weight": "_v"}
"""What follows `lora_A` for weights that are not a layer's only one."""


class Ours:
    """The library of this repository; it is held to every check, on every layer."""

    name: ClassVar[str] = "lora_plugins"
    skipped: ClassVar[Mapping[str, str]] = {}

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
        for name, layer in self.model.named_modules():
            for suffix in ("", *SUFFIXES.values()):
                if f"lora_A{suffix}" in layer._modules:
                    A, B = (layer._modules[f"lora_{factor}{suffix}"][ADAPTER] for factor in "AB")
                    found.setdefault(id(A), Update(name, _tensor(layer, suffix), A, B, CONFIG.alpha / CONFIG.r))
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


def _tensor(layer: nn.Module, suffix: str) -> str:
    return next((tensor for tensor, s in SUFFIXES.items() if s == suffix), weights_of(layer)[0])
