"""What an init plugin says: how A and B start, and whether the base weight changes with them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class InitContext:
    """All that an init sees of one slot.

    Args:
        layer: Full name of the layer, for messages.
        weight: `(out, in)`, the matrix view of the untouched base weight, in float32 or better. Read only.
        A: `(r, in)`, to be filled in place; same type as `weight`, on the CPU.
        B: `(out, r)`, likewise.
        scaling: The factor of `B @ A` in the update.
        lookup: True where columns of A are looked up by index, so that A is the one to start at zero.
        generator: Seeded from the run's seed and the layer's name; draw from nothing else.
        options: `init_options` of the config.
    """

    layer: str
    weight: Tensor
    A: Tensor
    B: Tensor
    scaling: float
    lookup: bool
    generator: torch.Generator
    options: Mapping[str, Any]


class InitPlugin(ABC):
    """How A and B of an adapter start.

    Attributes:
        name: The name that `LoraConfig.init` asks for.
        options: The keys that `init_options` may have, with their defaults.
        identity: Whether the adapted layer starts as the untouched one (exactly, or for an init that changes the
            base, approximately).
        changes_base: Whether the base weight is replaced; `changed_base` then says by what.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    identity: ClassVar[bool] = True
    changes_base: ClassVar[bool] = False

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises an error for a value that an option cannot have; unknown keys were refused before.

        Args:
            options: `options` of the class, updated with those of the config.

        Raises:
            ConfigError: If a value is wrong, naming the option.
        """

    @abstractmethod
    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills `context.A` and `context.B` in place.

        Returns:
            The tensors that `changed_base` needs; they are stored with the adapter. Empty unless the init changes
            the base.
        """

    def changed_base(
        self, weight: Tensor, recipe: Mapping[str, Tensor], scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Computes the new base from the original one, at injection and again when an adapter is loaded.

        It has to give the same bits each time, so sensitive sums belong in float64.

        Args:
            weight: `(out, in)`, the matrix view of the original weight.
            recipe: What `fill` returned.
            scaling: The factor of `B @ A` in the update.
            options: `init_options` of the config, with defaults.
        """
        raise NotImplementedError(f"{type(self).__name__} says changes_base=True but has no changed_base.")
