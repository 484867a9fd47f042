"""What an init plugin says: how A and B start, and whether the base weight changes with them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lora_plugins import words
from lora_plugins.plugins.kind import A_FLAG, A_NAME, PluginKind, are_options, are_patterns

Needs = Literal["inputs", "gradients"]
"""What an init can ask of the user's data."""


@dataclass(frozen=True)
class InputMoments:
    """What is kept of the vectors that a weight was multiplied by.

    Args:
        count: How many vectors there were.
        total: `(in,)`, their sum, float64 on the CPU.
        gram: `(in, in)`, the sum of their outer products with themselves, likewise.
    """

    count: int
    total: Tensor
    gram: Tensor

    def scatter(self) -> Tensor:
        """Returns the sum of the outer products after the mean vector was subtracted, `(in, in)`."""
        return self.gram - torch.outer(self.total, self.total) / self.count


@dataclass(frozen=True)
class SlotCalibration:
    """What one pass over the user's data showed of one slot; only what the init `needs` is there.

    Args:
        inputs: The moments of the vectors that the slot's matrix was multiplied by.
        gradient: `(out, in)`, the gradient of the loss in the matrix view, averaged over batches, on the CPU, in
            float32 or better.
    """

    inputs: InputMoments | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class RankRequest:
    """One layer that an init may give another rank.

    Args:
        layer: Full name of the layer.
        r: The rank that the config gives it.
        slots: What was observed of each of its slots.
    """

    layer: str
    r: int
    slots: Sequence[SlotCalibration]


@dataclass(frozen=True)
class InitContext:
    """All that an init sees of one slot.

    Args:
        layer: Full name of the layer, for messages.
        weight: `(out, in)`, the matrix view of the untouched base weight, in float32 or better, on the CPU. Read
            only.
        A: `(r, in)`, to be filled in place; of the same type, likewise on the CPU.
        B: `(out, r)`, likewise.
        scaling: The factor of `B @ A` in the update.
        lookup: True where columns of A are looked up by index, so that A is the one to start at zero.
        generator: Seeded from the run's seed and the layer's name; draw from nothing else.
        options: `init_options` of the config, with defaults.
        calibration: What the data showed, for an init that `needs` some.
        stored: Returns the dense value that the weight would have if it were stored with these values, `(out, in)`;
            None where it stays as it is.
    """

    layer: str
    weight: Tensor
    A: Tensor
    B: Tensor
    scaling: float
    lookup: bool
    generator: torch.Generator
    options: Mapping[str, Any]
    calibration: SlotCalibration = SlotCalibration()
    stored: Callable[[Tensor], Tensor] | None = None


class InitPlugin(ABC):
    """How A and B of an adapter start.

    Attributes:
        name: The name that `LoraConfig.init` asks for.
        options: The keys that `init_options` may have, with their defaults.
        identity: Whether the adapted layer starts as the untouched one: exactly, or up to rounding where both factors
            start away from zero; for an init that changes the base, approximately.
        changes_base: Whether the base weight is replaced; `changed_base` then says by what.
        needs: What the init asks of the user's data: the `inputs` of each layer, the `gradients` of each weight, or
            None. It finds it in `context.calibration`. An adapter that is loaded needs no data again.
        storage_options: Those of the options that the base's storage decides, where it is stored.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    identity: ClassVar[bool] = True
    changes_base: ClassVar[bool] = False
    needs: ClassVar[Needs | None] = None
    storage_options: ClassVar[Sequence[str]] = ()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises an error for a value that an option cannot have; unknown keys were refused before.

        It is called again when an adapter is loaded, so it must not refuse one for a file or device that is missing.

        Args:
            options: `options` of the class, updated with those of the config.

        Raises:
            ConfigError: If a value is wrong, naming the option.
        """

    def allocate(self, requests: Sequence[RankRequest], options: Mapping[str, Any]) -> Mapping[str, int]:
        """Returns other ranks than the config's, by layer name; a layer of rank 0 is not adapted.

        Called once, before any `fill`, for an init that `needs` data. The scaling of each layer stays what it was. The
        ranks are stored with the adapter.

        Args:
            requests: All layers, with what was observed of them.
            options: `init_options` of the config, with defaults.
        """
        return {}

    @abstractmethod
    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills `context.A` and `context.B` in place.

        Returns:
            The tensors that `changed_base` needs, dense ones by names without `/`; they are stored with the adapter.
            Empty unless the init changes the base.
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

    def base_to_store(
        self, weight: Tensor, recipe: Mapping[str, Tensor], scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Computes what is stored in place of the original base, where it is stored in fewer bytes.

        By default what `changed_base` returns; an init that itself quantizes returns what it would quantize.

        Args:
            weight: As in `changed_base`, as are the others.
            recipe: What `fill` returned.
            scaling: The factor of `B @ A` in the update.
            options: `init_options` of the config, with defaults.
        """
        return self.changed_base(weight, recipe, scaling, options)


def _contradiction(plugin: InitPlugin) -> str:
    if plugin.changes_base and type(plugin).changed_base is InitPlugin.changed_base:
        return "says changes_base=True and has no changed_base"
    unused = {
        "changed_base": "" if plugin.changes_base else "changes_base=False",
        "base_to_store": "" if plugin.changes_base else "changes_base=False",
        "allocate": "" if plugin.needs else "needs=None",
    }
    for method, says in unused.items():
        if says and getattr(type(plugin), method) is not getattr(InitPlugin, method):
            return f"has a method {method} and says {says}, so it is never called"
    return ""


INITS = PluginKind[InitPlugin](
    name="inits",
    title="init",
    base=InitPlugin,
    rules={
        "name": A_NAME,
        "options": (are_options, "a mapping of option names to their defaults"),
        "identity": A_FLAG,
        "changes_base": A_FLAG,
        "storage_options": (are_patterns, "a list of names of options"),
        "needs": (lambda value: value is None or value in get_args(Needs), f"None or one of {get_args(Needs)}"),
    },
    claims={"init": lambda plugin: plugin.name},
    contradiction=_contradiction,
    words=words.INITS,
)
"""Inits, chosen by `LoraConfig(init=...)`."""
