"""Weights as 8-bit floating numbers (E4M3), with a scale for each row."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_plugins import ConfigError, StoragePlugin, StorageRegistrar, hookimpl

LARGEST = 448.0
"""The largest number of E4M3."""


class Fp8Storage(StoragePlugin):
    """Option: `headroom`, the share of the type's range that a row takes at most."""

    name = "fp8"
    options: ClassVar[Mapping[str, Any]] = {"headroom": 1.0}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses what is no share."""
        if not isinstance(options["headroom"], float) or not 0 < options["headroom"] <= 1:
            raise ConfigError(f"quantize_options: headroom of fp8 is a share, not {options['headroom']!r}.")

    def store(self, weight: Tensor, options: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Divides each row by its scale; the bytes are those of E4M3."""
        rows = weight.reshape(len(weight), -1)
        scales = rows.abs().amax(1) / (LARGEST * options["headroom"])
        shares = rows / torch.where(scales == 0, 1, scales)[:, None]
        return {"codes": shares.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8), "scales": scales}

    def restore(self, tensors: Mapping[str, Tensor], shape: torch.Size, options: Mapping[str, Any]) -> Tensor:
        """Multiplies each row with its scale."""
        shares = tensors["codes"].view(torch.float8_e4m3fn).float()
        return (shares * tensors["scales"][:, None]).view(shape)


@hookimpl
def lora_plugins_register_storages(registrar: StorageRegistrar) -> None:
    """Registers the storage."""
    registrar.add(Fp8Storage())
