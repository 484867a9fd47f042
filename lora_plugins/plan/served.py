"""Checks what a layer type says about a layer against what the rest of the framework relies on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.errors import LoraError, PluginError, listing, near, sentence
from lora_plugins.field_checks import shown
from lora_plugins.plugins import LayerPlugin, Slot
from lora_plugins.utils import shape_or_value


def slots_of(method: str, given: Any) -> tuple[Slot, ...]:
    """Returns the slots that a method of a layer type gave.

    Raises:
        PluginError: If that is no list of slots, or one of them cannot name its A and B or cut a matrix.
    """
    listed = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else None
    if listed is None or not all(isinstance(each, Slot) for each in listed):
        found = given if listed is None else listed
        raise PluginError(f"{method}() gives {shown(found)}: list slots, [Slot('weight')]")
    for slot in listed:
        if not f"lora_A{slot.suffix}".isidentifier():
            raise PluginError(f"{method}() has the part {slot.part!r}: lora_A{slot.suffix} can be no attribute")
        if slot.rows is not None and not _are_rows(slot.rows):
            raise PluginError(f"{method}() has a slot with rows={slot.rows!r}: give a tuple, (first, end, all rows)")
    return listed


def _are_rows(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(each, Integral) for each in value)


def parts_of(given: Any) -> dict[str, Slot]:
    """Returns the slots of parts that a layer type gave.

    Raises:
        PluginError: As `slots_of` does, or if they are not by part.
    """
    if not isinstance(given, Mapping):
        raise PluginError(f"parts() gives {shown(given)}: map parts to slots, {{'q': Slot('weight', 'q', rows)}}")
    return dict(zip(given, slots_of("parts", tuple(given.values())), strict=True))


def biases_of(given: Any) -> tuple[str, ...]:
    """Returns the names of biases that a layer type gave.

    Raises:
        PluginError: If that is no list of names.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise PluginError(f"biases() gives {shown(given)}: list names, ['bias']")
    return tuple(given)


def check_slots(method: str, slots: Sequence[Slot], rows: Mapping[str, int]) -> None:
    """Refuses slots that would share their A and B, or cover rows that the weight does not have.

    How many rows the matrix of each weight has is told by `rows`, where that is known.

    Raises:
        PluginError: If one of them is wrong.
    """
    by_part: dict[str, Slot] = {}
    for slot in slots:
        if (other := by_part.setdefault(slot.part, slot)) is not slot:
            raise PluginError(
                f"{method}() gives {other.tensor!r} and {slot.tensor!r} the part {slot.part!r}, which names their A "
                f"and B. Each needs a part of its own, as in Slot({slot.tensor!r}, part=...)"
            )
        if slot.rows is None or slot.tensor not in rows:
            continue
        start, stop, total = slot.rows
        is_empty = start == stop and total > 0  # a layer without outputs has empty parts
        if is_empty or not 0 <= start <= stop <= total == rows[slot.tensor]:
            raise PluginError(
                f"{method}() has a slot with rows={slot.rows}, and the matrix of {slot.tensor!r} has "
                f"{rows[slot.tensor]} rows"
            )


def check_parts(parts: Mapping[str, Slot]) -> None:
    """Refuses a part whose A and B would have the name of another one.

    Raises:
        PluginError: If there is one.
    """
    for part, slot in parts.items():
        if slot.part != part:
            raise PluginError(f"parts() gives {part!r} a slot whose A and B are named by the part {slot.part!r}")


def weight_of(layer: nn.Module, tensor: str, read: Callable[[nn.Module, str], Tensor]) -> Tensor:
    """Reads a weight that a layer type names.

    Raises:
        PluginError: If the layer has no such weight.
    """
    try:
        return read(layer, tensor)
    except (AttributeError, KeyError) as error:
        known = [name for name, parameter in layer._parameters.items() if parameter is not None]
        others = near(tensor, known) if known else "What the children of a layer hold belongs to their layer types."
        raise PluginError(
            f"a slot names the weight {tensor!r}, which is none of the layer's own. {others} If a wrapper computes it "
            "in its forward, as spectral norms of GANs do, run the model once on a batch, then adapt it"
        ) from error


def matrix_shape(plugin: LayerPlugin[Any], weight: Tensor, tensor: str) -> tuple[int, int]:
    """Returns `(out, in)` of the matrix that a layer type makes of a weight.

    Raises:
        PluginError: If it makes none, or lays it out otherwise than the weight.
    """
    try:
        matrix = plugin.to_matrix(weight)
    except Exception as error:  # a third party's
        raise PluginError(f"to_matrix of {tensor!r}, {tuple(weight.shape)}, raised {_said(error)}") from error
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        made = shape_or_value(matrix)
        raise PluginError(f"to_matrix of {tensor!r}, {tuple(weight.shape)}, gives {made!r} and no matrix (out, in)")
    try:
        back = plugin.from_matrix(torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device), weight.shape)
    except Exception as error:  # likewise
        raise PluginError(f"from_matrix for {tensor!r}, {tuple(weight.shape)}, raised {_said(error)}") from error
    if not isinstance(back, Tensor) or back.shape != weight.shape:
        made = shape_or_value(back)
        raise PluginError(f"from_matrix for {tensor!r}, {tuple(weight.shape)}, gives {made!r} and not that shape")
    rows, columns = matrix.shape
    return rows, columns


def failure(plugin: LayerPlugin[Any], names: Iterable[str], class_name: str, error: Exception) -> PluginError:
    """Returns the error for a layer type that failed on a layer, with what it raised as its cause."""
    said = PluginError(
        f"The layer type {plugin.name!r} cannot serve {listing(names)}, a {class_name}: {_said(error)} Exclude the "
        f"layer, or mend {type(plugin).__name__}."
    )
    said.__cause__ = error
    return said


def _said(error: Exception) -> str:
    text = sentence(error)
    return text if isinstance(error, LoraError) else f"{type(error).__name__}: {text}"
