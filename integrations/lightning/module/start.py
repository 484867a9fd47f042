"""The state of a module with adapters, to tell by checksums what its own hooks write into the frozen base."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_plugins.integrations.lightning.module.bitwise import checksum
from lora_plugins.integrations.lightning.module.merged_base import merged_weights
from lora_plugins.integrations.lightning.module.moved_tensors import known_fingerprints, mark_moved, take_fingerprints
from lora_plugins.integrations.lightning.module.tensors import frozen_tensors

Sums = Mapping[str, tuple[torch.dtype, int]]
"""Type and checksum of tensors by name."""


@dataclass(frozen=True)
class Start:
    """The state of a module when it was adapted.

    Args:
        sums: Of each tensor that no adapter may change.
        fingerprints: Of what adapters are trained on; where that is a merged weight, of the pretrained one.
    """

    sums: Sums = field(default_factory=dict)
    fingerprints: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> "Start":
        """Records the present state of a module."""
        merged = {name: values for name, values in merged_weights(module).items() if values}
        return cls(_frozen_sums(module), {**known_fingerprints(module), **merged})

    def mark_written(self, module: nn.Module) -> None:
        """Records, on the module, that it has written what has changed since."""
        now = _frozen_sums(module)
        # In another type they cannot be compared: a precision plugin has converted them.
        alike = [name for name, (dtype, _) in self.sums.items() if name in now and now[name][0] == dtype]
        written = [name for name in alike if now[name] != self.sums[name]]
        if written:
            take_fingerprints(module)  # which adapters forget when a whole base is loaded
        mark_moved(module, written, self.fingerprints)


def _frozen_sums(module: nn.Module) -> Sums:
    return {name: (tensor.dtype, checksum(tensor)) for name, tensor in frozen_tensors(module).items()}
