"""Checks what inits and variants of plugins return, before anything is touched, and copies it.

Without a copy, a returned view of the base weight would be trained in it, or change with it.
"""

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.errors import PluginError, StateError, noted
from lora_plugins.plugins import InitContext, InitPlugin, PlannedLayer, Slot, Storage
from lora_plugins.utils import is_dense, shape_or_value, version


@contextmanager
def read_only(weight: Tensor, place: str) -> Iterator[None]:
    """Checks that a plugin does not write into a weight that it is handed to read; a copy would take too long.

    `place` says, for the message, which method of which plugin the block calls, and for which layer.

    Raises:
        PluginError: If it was written to.
    """
    before = version(weight)
    yield
    if version(weight) != before:
        raise PluginError(
            f"{place}, wrote into the weight that it is handed to read, which is the model's own. Build the model "
            "again, or load its weights again, and let the plugin work on weight.clone()."
        )


def check_filled(init: InitPlugin, context: InitContext, r: int, shape: tuple[int, int]) -> None:
    """Checks that an init has filled A and B, which hold NaN before; `shape` is (out, in) of the matrix.

    Raises:
        StateError: If torch's own inits do nothing here, since new modules are kept empty.
        PluginError: If the init gave them another shape, left values out, or computed some that are not finite.
    """
    expected = {"A": (r, shape[1]), "B": (shape[0], r)}
    found = {"A": tuple(context.A.shape), "B": tuple(context.B.shape)}
    if found != expected:
        raise PluginError(
            f"fill() of the init {init.name!r} gave A and B of {context.layer!r} other shapes, {found}: they are "
            f"{expected}. Fill them in place, as by context.A.copy_(...)."
        )
    if bool(context.A.isfinite().all() and context.B.isfinite().all()):
        return
    if bool(nn.init.constant_(torch.ones(1, device="cpu"), 0.0)):
        raise StateError(
            "torch.nn.init does nothing here, as inside init_module(empty_init=True) of Fabric and of the Trainer, so "
            "neither the model nor A and B get values. Adapt the model after that block, when it has its weights."
        )
    raise PluginError(
        f"fill() of the init {init.name!r} left values of A or B of {context.layer!r} unset, or not finite. Are the "
        "weights of that layer finite?"
    )


def recipe_of(init: InitPlugin, layer: PlannedLayer, returned: Any) -> dict[str, Tensor]:
    """Returns what an init needs to compute the changed base again, from what its `fill` returned.

    Raises:
        PluginError: If that is no mapping of tensors, or has tensors that no file can hold or the init does not need.
    """
    others = {name: value for name, value in _items(returned) if not isinstance(value, Tensor)}
    if not isinstance(returned, Mapping) or others:
        expected = "a mapping of tensors" if init.changes_base else "{}"
        said = reprlib.repr(others or returned)
        raise PluginError(f"fill() of the init {init.name!r} returned {said} for {layer.name!r}, not {expected}.")
    if returned and not init.changes_base:
        raise PluginError(
            f"fill() of the init {init.name!r} returned {list(returned)} for {layer.name!r}, which changed_base would "
            "need, and the init says changes_base=False. Return {}."
        )
    if odd := [name for name, value in returned.items() if not _can_be_saved(name, value)]:
        raise PluginError(
            f"fill() of the init {init.name!r} returned {odd} for {layer.name!r}, which no file can hold: a recipe has "
            "dense tensors, whose names are texts without '/'."
        )
    return {name: value.detach().clone() for name, value in returned.items()}


def base_of(init: InitPlugin, layer: PlannedLayer, returned: Any, shape: torch.Size) -> Tensor:
    """Returns the rows of a base weight that an init computed, `(out, in)` as those that it was handed.

    Raises:
        PluginError: If that is no matrix of this shape, or has values that are not finite.
    """
    if not isinstance(returned, Tensor) or returned.shape != shape:
        found = shape_or_value(returned)
        raise PluginError(
            f"The init {init.name!r} computed {found!r} as the base of {layer.name!r}, where the weight is "
            f"{tuple(shape)}."
        )
    if not _has_values(returned):
        raise PluginError(
            f"The init {init.name!r} computed a base of {layer.name!r} with values that are not dense and finite."
        )
    return returned


def check_stored(storage: Storage, name: str, dense: Tensor) -> None:
    """Checks the dense value that a storage restores of a finite weight.

    Raises:
        PluginError: If that has values that are not finite.
    """
    if not _has_values(dense):
        raise PluginError(f"restore() of {storage} gives {name!r} values that are not dense and finite.")


def own_values(layer: PlannedLayer, slot: Slot, returned: Any) -> dict[str, Tensor]:
    """Returns the first values of the own tensors of a layer's variant, from what its `first_values` returned.

    Raises:
        PluginError: If they do not have the names, shapes and types of a variant's tensors, or have no finite values.
    """
    assert layer.variant is not None
    with noted(f"shapes() of the variant {layer.variant.name!r}, for {layer.name!r}"):
        expected = layer.own_shapes(slot)
    tensors = dict(_items(returned))
    found = {name: getattr(value, "shape", None) for name, value in tensors.items()}
    if not _are_shapes(expected) or found != {name: torch.Size(shape) for name, shape in expected.items()}:
        raise PluginError(
            f"The variant {layer.variant.name!r} cannot serve {layer.name!r}: shapes() gives {expected!r}, and "
            f"first_values() tensors of { {name: shape and tuple(shape) for name, shape in found.items()}!r}."
        )
    if factors := [name for name in found if name in ("A", "B") or not str(name).isidentifier()]:
        raise PluginError(
            f"The variant {layer.variant.name!r} has tensors that cannot be called so: {factors}. Call them by Python "
            "identifiers other than 'A' and 'B', which are the factors."
        )
    if odd := [name for name, value in tensors.items() if not value.is_floating_point()]:
        raise PluginError(
            f"first_values() of the variant {layer.variant.name!r} gives {odd} of {layer.name!r} types that cannot be "
            "trained, as all tensors of a variant are. Give floating numbers, and make in delta_weight() what is none."
        )
    if odd := [name for name, value in tensors.items() if not _has_values(value)]:
        raise PluginError(
            f"first_values() of the variant {layer.variant.name!r} gives {odd} of {layer.name!r} no values that are "
            "dense and finite. Are the weights of that layer finite?"
        )
    # In the order of shapes(), as a loaded adapter has them: optimizers know parameters by their order.
    return {name: tensors[name].detach().clone() for name in expected}


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, Mapping) else ()


def _can_be_saved(name: Any, value: Tensor) -> bool:
    return isinstance(name, str) and "/" not in name and is_dense(value)


def _has_values(value: Tensor) -> bool:
    return is_dense(value) and bool(value.isfinite().all())


def _are_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(shape, list | tuple) and all(isinstance(size, Integral) for size in shape)
        for shape in value.values()
    )
