"""The state of a module with adapters, to tell by checksums what its own hooks write into the frozen base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

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
    def of(cls, module: nn.Module, but: Collection[str] = ()) -> "Start":
        """Records the present state of a module.

        Tensors that `but` names are left out: a checkpoint does not hold them, so the module cannot have written them
        without being of another base.
        """
        merged = {name: values for name, values in merged_weights(module).items() if values}
        other = frozenset(but)
        tensors = {name: tensor for name, tensor in frozen_tensors(module).items() if name not in other}
        return cls(_sums(tensors), {**known_fingerprints(module), **merged})

    def without(self, names: Collection[str]) -> "Start":
        """Returns it without tensors that were changed since, and not by the module."""
        return replace(self, sums={name: value for name, value in self.sums.items() if name not in names})

    def mark_written(self, module: nn.Module) -> None:
        """Records, on the module, that it has written what has changed since."""
        now = _sums({name: tensor for name, tensor in frozen_tensors(module).items() if name in self.sums})
        # In another type they cannot be compared: a precision plugin has converted them.
        written = [name for name in now if now[name][0] == self.sums[name][0] and now[name] != self.sums[name]]
        if written:
            take_fingerprints(module)  # which adapters forget when a whole base is loaded
        mark_moved(module, written, self.fingerprints)


def _sums(tensors: Mapping[str, Tensor]) -> Sums:
    return {name: (tensor.dtype, checksum(tensor)) for name, tensor in tensors.items()}
