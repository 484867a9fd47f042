"""Planned layers and tensors in groups, for tables that people read: `blocks.0-11.attn.qkv`, 12 layers."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lora_plugins.plan.patterns import ends_with
from lora_plugins.plugins import PlannedLayer
from lora_plugins.utils import path_starts

_NUMBER = re.compile(r"(?<![^. ])(0|[1-9]\d*)(?![^. \[])")
"""A component of a name that is the number of a block."""

_Box = tuple[tuple[int, ...], ...]
"""The numbers of a group by their places in the name: it holds every combination of them."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose names differ in the numbers of blocks only, with one class, plugin, variant, rank and alpha.

    Args:
        name: Their names in one, such as `blocks.0-11.attn.qkv`; a layer that shares its weight has several.
        layers: The layers, in the order of the model.
    """

    name: str
    layers: tuple[PlannedLayer, ...]

    @property
    def parameters(self) -> int:
        """The number of elements of all A and B."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight(self) -> int:
        """The number of elements of the weights that are updated."""
        return sum(rows * columns for layer in self.layers for rows, columns in layer.shapes)

    @property
    def share(self) -> float:
        """The parameters as a share of the weights, which may have no elements."""
        return self.parameters / self.weight if self.weight else math.inf


def layer_label(layer: PlannedLayer) -> str:
    """Returns what a table calls a layer: all of its names, and the parts of a fused weight."""
    names = (layer.name or "(the model)", *layer.aliases, *(tie.layer for tie in layer.ties))
    return " = ".join(names) + "".join(f"[{slot.part}]" for slot in layer.slots if slot.part)


def group_layers(layers: Sequence[PlannedLayer]) -> list[LayerGroup]:
    """Returns layers in groups, in the order of the first of each; every layer is in one group."""
    alike: dict[tuple[object, ...], list[PlannedLayer]] = defaultdict(list)
    for layer in layers:
        variant = layer.variant and layer.variant.name
        alike[layer.module_class, layer.plugin.name, variant, layer.r, layer.alpha].append(layer)
    groups = []
    for members in alike.values():
        by_label = {layer_label(layer): layer for layer in members}
        for name, labels in group_names(by_label).items():
            groups.append(LayerGroup(name, tuple(by_label[each] for each in labels)))
    order = {layer.name: at for at, layer in enumerate(layers)}
    return sorted(groups, key=lambda group: order[group.layers[0].name])


def group_tensors(tensors: Sequence[str], modules: Collection[str]) -> dict[str, int]:
    """Returns how many tensors there are by the name of what they belong to.

    Modules are named by whole components from the end, as in `modules_to_save`. Their tensors count under their names,
    others under their own.
    """
    owners = {name: _owner(name, modules) for name in tensors}
    labels = {name: label for label, names in group_names(dict.fromkeys(owners.values())).items() for name in names}
    counts: dict[str, int] = defaultdict(int)
    for owner in owners.values():
        counts[labels[owner]] += 1
    return dict(counts)


def group_names(names: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """Returns names by what they have in common: `a.0.b` and `a.1.b` under `a.0-1.b`.

    A group has every combination of the numbers that its label shows, so a label names no name that is not there.
    """
    alike: dict[tuple[str, ...], dict[tuple[int, ...], str]] = defaultdict(dict)
    for name in names:
        parts = _NUMBER.split(name)
        alike[tuple(parts[::2])][tuple(map(int, parts[1::2]))] = name
    groups = {}
    for texts, members in alike.items():
        for box in _boxes(members):
            members_of_box = {members[numbers] for numbers in product(*box)}
            label = texts[0] + "".join(_ranges(axis) + text for axis, text in zip(box, texts[1:], strict=True))
            groups[label] = [name for name in members.values() if name in members_of_box]
    return groups


def _owner(tensor: str, modules: Collection[str]) -> str:
    around = reversed(path_starts(tensor)[1:])
    owners = (path for path in around if any(ends_with(module, path) for module in modules))
    return next(owners, tensor)


def _boxes(rows: Iterable[tuple[int, ...]]) -> Iterator[_Box]:
    """Yields boxes that together hold each of the rows once, and nothing else."""
    tails: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for row in rows:
        if not row:
            yield ()
            return
        tails[row[0]].add(row[1:])
    heads: dict[frozenset[tuple[int, ...]], list[int]] = defaultdict(list)
    for head, tail in sorted(tails.items()):
        heads[frozenset(tail)].append(head)
    for rest, axis in heads.items():
        for box in _boxes(sorted(rest)):
            yield (tuple(axis), *box)


def _ranges(numbers: Sequence[int]) -> str:
    """Writes rising numbers as `0-3,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
