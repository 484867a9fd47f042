"""One planned layer: what planning decides of a layer, and what its adapter carries from then on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_plugins.config import LayerSettings
from lora_plugins.plugins.layer import BranchUse, LayerPlugin
from lora_plugins.plugins.slot import Slot
from lora_plugins.plugins.variant import VariantPlugin


@dataclass(frozen=True)
class Tie:
    """A weight of another layer that is the same tensor, and so gets the same update.

    Args:
        layer: Name of the other layer.
        tensor: Attribute name of the weight there.
        source: Attribute name of the weight in the layer that has the adapter.
        branch_use: When the plugin's branch replaces the other layer's own forward.
    """

    layer: str
    tensor: str
    source: str
    branch_use: BranchUse = field(default="never", compare=False)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that is to be adapted; the adapted layer holds this very record.

    Args:
        name: Full name of the layer.
        aliases: Other names of the same module.
        module_class: Name of its class.
        plugin: The plugin that serves it.
        branch_use: When the plugin's branch replaces the layer's own forward.
        slots: Where the updates go.
        shapes: `(out, in)` of the matrix view of each slot.
        settings: Rank, scaling, dropout and what else is a number.
        variant: How A and B change the weight; None for plain LoRA.
        ties: Weights of other targeted layers that are the same tensor.
    """

    name: str
    aliases: tuple[str, ...]
    module_class: str
    plugin: LayerPlugin[Any]
    branch_use: BranchUse
    slots: tuple[Slot, ...]
    shapes: tuple[tuple[int, int], ...]
    settings: LayerSettings
    variant: VariantPlugin | None = None
    ties: tuple[Tie, ...] = ()

    @property
    def r(self) -> int:
        """The rank."""
        return self.settings.r

    @property
    def alpha(self) -> float:
        """The numerator of the scaling."""
        return self.settings.alpha

    @property
    def scaling(self) -> float:
        """The factor of `B @ A`."""
        return self.settings.scaling

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors of the adapter on the layer."""
        own = [math.prod(shape) for slot in self.slots for shape in self.own_shapes(slot).values()]
        return sum(self.r * (rows + columns) for rows, columns in self.shapes) + sum(own)

    @property
    def rescales(self) -> bool:
        """Whether the variant rescales the rows of the whole weight, and the plugin computes with that."""
        whole = len(self.slots) == 1 and self.slots[0].rows is None and self.plugin.branch_takes_rescaling
        return whole and self.variant is not None and self.variant.rescales_rows

    def own_shapes(self, slot: Slot) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of the variant's own tensors of one slot, by name."""
        if self.variant is None:
            return {}
        # By name, since torch.compile does not follow how dataclasses are compared.
        shapes = {each.suffix + each.tensor: shape for each, shape in zip(self.slots, self.shapes, strict=True)}
        return self.variant.shapes(*shapes[slot.suffix + slot.tensor], self.r)

    def with_settings(self, **changes: Any) -> "PlannedLayer":
        """Returns the layer with other settings."""
        return replace(self, settings=replace(self.settings, **changes))

    def tied(self, tie: Tie) -> "PlannedLayer":
        """Returns what another layer holds whose weight is the same tensor."""
        chosen = [at for at, slot in enumerate(self.slots) if slot.tensor == tie.source]
        return replace(
            self,
            name=tie.layer,
            aliases=(),
            branch_use=tie.branch_use,
            slots=tuple(replace(self.slots[at], tensor=tie.tensor) for at in chosen),
            shapes=tuple(self.shapes[at] for at in chosen),
            ties=(),
        )
