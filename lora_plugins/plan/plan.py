"""What would be adapted, as plain data: which layers, by which plugin, with which rank and scaling."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_plugins.config import LoraConfig, rank_divisor
from lora_plugins.errors import counted, listing
from lora_plugins.plan.groups import LayerGroup, group_layers, group_tensors, layer_label
from lora_plugins.plan.targets import LeftOut
from lora_plugins.plugins import InitPlugin, PlannedLayer, Slot, Storage


@dataclass(frozen=True)
class Plan:
    """What one adapter would do to one model.

    Args:
        config: The configuration.
        init: The init plugin.
        layers: The layers to adapt, in the order of the model.
        trained: Names of the model's own parameters that are trained in place: heads and biases.
        saved_buffers: Names of buffers that move during training and are saved with the adapter.
        frozen_norms: Names of normalization layers that are kept in eval mode.
        base_parameters: The number of elements of all parameters of the model.
        trained_parameters: The number of elements of `trained`.
        stored: How weights are stored, by full name; those that are not there stay as they are.
        ranks: Ranks that the init gave in place of the config's, by layer name; 0 where a layer was left out.
        left_out: What `target_modules="all"` does not adapt though it has weights that could be, one entry a type.
        layer_types: The names of all layer types that there were: what "all" meant.
    """

    config: LoraConfig
    init: InitPlugin
    layers: tuple[PlannedLayer, ...]
    trained: tuple[str, ...]
    saved_buffers: tuple[str, ...]
    frozen_norms: tuple[str, ...]
    base_parameters: int
    trained_parameters: int
    stored: Mapping[str, Storage] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    layer_types: tuple[str, ...] = ()

    @property
    def init_options(self) -> Mapping[str, Any]:
        """The options of the init, defaults included."""
        return {**self.init.options, **self.config.init_options}

    @property
    def saved_in_place(self) -> tuple[str, ...]:
        """Names of the model's own tensors that are saved with the adapter: `trained` and `saved_buffers`."""
        return (*self.trained, *self.saved_buffers)

    @property
    def adapter_parameters(self) -> int:
        """The number of elements of all A and B, and of the variant's own tensors."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable(self) -> int:
        """The number of elements that would be trained."""
        return self.adapter_parameters + self.trained_parameters

    @property
    def total(self) -> int:
        """The number of elements of the model with the adapter."""
        return self.base_parameters + self.adapter_parameters

    def with_ranks(self, ranks: Mapping[str, int]) -> "Plan":
        """Returns the plan with other ranks by layer name, each scaling as it was; layers of rank 0 are left out."""
        layers = tuple(
            layer.with_settings(r=r, alpha=layer.scaling * rank_divisor(r, use_rslora=self.config.use_rslora))
            if (r := ranks.get(layer.name, layer.r)) != layer.r
            else layer
            for layer in self.layers
        )
        return replace(self, layers=tuple(layer for layer in layers if layer.r), ranks=dict(ranks))

    def slots(self) -> Iterator[tuple[PlannedLayer, Slot, tuple[int, int]]]:
        """Yields layer, slot and `(out, in)` of everything that gets an A and a B."""
        for layer in self.layers:
            for slot, shape in zip(layer.slots, layer.shapes, strict=True):
                yield layer, slot, shape

    def weights(self) -> dict[str, set[str]]:
        """Returns the attribute names of the updated weights by layer name, tied layers included."""
        found: dict[str, set[str]] = {}
        for layer in self.layers:
            found[layer.name] = {slot.tensor for slot in layer.slots}
            for tie in layer.ties:
                found.setdefault(tie.layer, set()).add(tie.tensor)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of it, a sentence each: what "all" leaves out, and that no layer can use its rank."""
        sides = {layer.name: max(map(min, layer.shapes)) for layer in self.layers}
        beyond = [layer for layer in self.layers if layer.r > sides[layer.name]]
        said = [*map(str, self.left_out)]
        if beyond and len(beyond) == len(self.layers):
            most = max(beyond, key=lambda layer: sides[layer.name])
            said.append(
                "no layer can use its rank: that of an update is at most the smaller side of its weight, "
                f"{sides[most.name]} in {most.name!r} (r={most.r}) and no more in the others; what is above it costs "
                "memory and learns nothing more"
            )
        return tuple(said)

    @property
    def extent(self) -> str:
        """How many layers are adapted, such as `2 layers`."""
        return counted(len(self.layers), "layer")

    def summary(self) -> str:
        """Returns one line with the counts."""
        own = {tensor: None for layer in self.layers for slot in layer.slots for tensor in layer.own_shapes(slot)}
        *others, last = ("A", "B", *own)
        return (
            f"{self.extent} adapted, {self.trainable:,} of {self.total:,} parameters trainable "
            f"({self.trainable / self.total:.2%}): {self.adapter_parameters:,} in {', '.join(others)} and {last}, "
            f"{self.trained_parameters:,} trained in place"
        )

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Returns for each layer: name, class, plugin, rank, alpha and parameter count, as text."""
        return [
            (
                layer_label(layer),
                layer.module_class,
                layer.plugin.name,
                str(layer.r),
                f"{layer.alpha:g}",
                f"{layer.parameters:,}",
            )
            for layer in self.layers
        ]

    def groups(self) -> list[LayerGroup]:
        """Returns the layers in groups that differ in the numbers of blocks only, for tables that people read."""
        return group_layers(self.layers)

    def trained_groups(self) -> dict[str, int]:
        """Returns how many tensors are trained in place, by module of `modules_to_save` or else by their own name."""
        return group_tensors(self.trained, self.config.modules_to_save)

    def __str__(self) -> str:
        table = [("layer", "class", "plugin", "r", "alpha", "parameters"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        if self.trained:
            lines.append(f"trained in place: {listing(self.trained)}")
        if self.stored:
            kinds = listing(dict.fromkeys(storage.plugin.name for storage in self.stored.values()))
            lines.append(f"stored as {kinds}: {listing(self.stored)}")
        return "\n".join([*lines, *self.notes, self.summary()])
