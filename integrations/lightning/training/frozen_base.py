"""The frozen base as a run found it, by checksums, and the errors where something trains or changes it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.module import checksum, frozen_tensors, known_fingerprints, merged_weights

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
        return cls(frozen_sums(module), {**known_fingerprints(module), **merged})


def frozen_sums(module: nn.Module) -> Sums:
    """Returns type and checksum of each tensor that no adapter of a module may change."""
    return {name: (tensor.dtype, checksum(tensor)) for name, tensor in frozen_tensors(module).items()}


def check_in_no_optimizer(thawed: Mapping[str, nn.Parameter], held: Collection[int]) -> None:
    """Checks that nobody trains tensors of the base.

    Args:
        thawed: Those that require a gradient, by name.
        held: The parameters that optimizers have, by `id`.

    Raises:
        StateError: If some are among them, naming them.
    """
    trained = [name for name, parameter in thawed.items() if id(parameter) in held]
    if trained:
        raise StateError(
            f"{len(trained)} tensors of the frozen base were made trainable, by another callback (BackboneFinetuning "
            f"does that) or by the module: {listing(trained)}. An adapter's checkpoint does not hold them. To train "
            "them, list their modules in modules_to_save; to keep them frozen, remove the callback, or give the "
            "optimizer only what requires a gradient, where a module switches gradients of its parts, as GANs do."
        )


def changed(before: Mapping[str, int], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors whose bits have changed."""
    return [name for name, tensor in tensors.items() if name in before and checksum(tensor) != before[name]]


def check_unchanged(moved: Sequence[str]) -> None:
    """Checks that none of the frozen base has changed.

    Args:
        moved: The names of frozen tensors that have.

    Raises:
        StateError: If there are some, naming them.
    """
    if moved:
        raise StateError(
            f"{len(moved)} frozen tensors changed during training: {listing(moved)}. The adapter's checkpoints do not "
            "hold them and would be put onto another base. Likely causes: a module that unfreezes a part of itself, "
            "such as its head, which belongs into modules_to_save; a callback or a training step that writes into "
            "weights, which those of a teacher may do: freeze it with requires_grad_(False); a layer that updates "
            "statistics in a buffer while frozen; or an optimizer that writes into all that it has, as LBFGS does once "
            "a training has diverged: give it only what requires a gradient."
        )
