"""PEFT, run the same way: its own LoRA on every layer whose class it adapts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.exactness.reference import Update, expected_layers, weights_of

ADAPTER = "default"
SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention, Conv1D)
"""The classes that PEFT's own message about unsupported modules names."""


class Peft:
    """PEFT with `init_lora_weights=False`; transposed convolutions, which it does not know, are left out."""

    name: ClassVar[str] = "peft"
    skipped: ClassVar[Mapping[str, str]] = {
        "unmerged": "it takes the update off again by subtraction, which promises no bits",
        "residue": "it leaves the base frozen and moves keys, and promises nothing else",
    }

    def prepare(self, model: nn.Module) -> None:
        """Nothing: the base stays as it is."""

    def adapts(self, layer: nn.Module) -> bool:
        """Whether PEFT knows the class."""
        return isinstance(layer, SUPPORTED)

    def adapt(self, model: nn.Module) -> "PeftAdapted":
        """Targets every layer by its full name, but not the projection inside an attention that is adapted whole."""
        names = [name for name, layer in expected_layers(model) if self.adapts(layer)]
        inner = {f"{name}.out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
        # An expression, since a list would match the ends of longer names too.
        targets = "|".join(re.escape(name) for name in names if name not in inner)
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        return PeftAdapted(peft.get_peft_model(model, config))

    def load(self, model: nn.Module, folder: Path) -> "PeftAdapted":
        """Loads what `save_pretrained` wrote."""
        return PeftAdapted(peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True))


@dataclass(frozen=True)
class PeftAdapted:
    """A model that PEFT has wrapped."""

    wrapper: Any

    @property
    def model(self) -> nn.Module:
        """The user's own model, with PEFT's layers in it."""
        model: nn.Module = self.wrapper.base_model.model
        return model

    def updates(self) -> Sequence[Update]:
        """Reads A and B of PEFT's layers, under the names that the layers had before."""
        found = []
        for name, layer in self.model.named_modules():
            if not isinstance(layer, LoraLayer) or ADAPTER not in layer.scaling:
                continue
            original = name.replace(".base_layer", "")
            A, B = _factors(layer)
            found.append(Update(original, weights_of(layer.get_base_layer())[0], A, B, layer.scaling[ADAPTER]))
        return found

    def merge(self) -> None:
        """Merges, to be undone."""
        self.wrapper.merge_adapter()

    def unmerge(self) -> None:
        """Undoes `merge`."""
        self.wrapper.unmerge_adapter()

    def unload(self) -> nn.Module:
        """Removes the adapter."""
        model: nn.Module = self.wrapper.unload()
        return model

    def fold(self) -> nn.Module:
        """Merges for good."""
        model: nn.Module = self.wrapper.merge_and_unload()
        return model

    def save(self, folder: Path) -> None:
        """Writes the adapter."""
        self.wrapper.save_pretrained(str(folder), save_embedding_layers=False)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    if ADAPTER in layer.lora_embedding_A:
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
