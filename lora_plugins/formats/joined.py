"""Layers of a model of diffusers as its original implementation has them: one of them may be several of diffusers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.components import class_names
from lora_plugins.formats.original_names import Place, original_places
from lora_plugins.formats.original_tables import IN_COMFYUI, TRANSFORMERS
from lora_plugins.formats.portable import PortableLayer
from lora_plugins.inplace import base_class_of, submodule
from lora_plugins.utils import path_starts, single_at_least


def by_original_names(layers: Mapping[str, PortableLayer], model: nn.Module) -> dict[str, PortableLayer]:
    """Returns the layers of a model by the names that ComfyUI and the original implementation have for them.

    They are plain, without DoRA. Of several names, a layer has ComfyUI's, or the first. A model that is not of
    diffusers is an original one.

    Raises:
        AdapterFileError: If the original names of the model or of a layer are not known.
    """
    places = original_places(model, (IN_COMFYUI, TRANSFORMERS))
    _check_known(model, layers, places)
    originals: dict[str, str] = {}
    for original, place in places.items():
        for name in place.names:
            originals.setdefault(name, original)
    wanted = dict.fromkeys(originals.get(name, name) for name in layers)
    return {name: _joined(places.get(name, Place((name,))), layers, model) for name in wanted}


def _joined(place: Place, layers: Mapping[str, PortableLayer], model: nn.Module) -> PortableLayer:
    layer = _block_diagonal(place.names, layers, model) if len(place.names) > 1 else layers[place.names[0]]
    return layer.with_rows(partial(torch.roll, shifts=-(layer.outputs // 2), dims=0)) if place.swapped else layer


def _block_diagonal(names: Sequence[str], layers: Mapping[str, PortableLayer], model: nn.Module) -> PortableLayer:
    """Returns layers with the same inputs as one: every A that differs, and each B in the columns of its A.

    The layers that are not adapted have rows of zeros. B is multiplied only where the scalings differ.
    """
    adapted = {name: layers[name] for name in names if name in layers}
    first = next(iter(adapted.values()))
    downs: list[Tensor] = []
    columns = [_column(layer.A, downs) for layer in adapted.values()]
    r = sum(len(A) for A in downs)
    scaled = _scaled_alike([*adapted.values()])
    ups = {
        name: functional.pad(B, (column, r - column - B.shape[1]))
        for name, B, column in zip(adapted, scaled, columns, strict=True)
    }
    rows = [
        ups[name] if name in ups else first.B.new_zeros(cast(int, submodule(model, name).out_features), r)
        for name in names
    ]
    return PortableLayer(torch.cat(downs), torch.cat(rows), first.alpha * r / first.r)


def _column(A: Tensor, downs: list[Tensor]) -> int:
    """Returns where the rows of an A begin among those that are written, which it joins if it is not one of them."""
    column = 0
    for known in downs:
        if torch.equal(known, A):
            return column
        column += len(known)
    downs.append(A)
    return column


def _scaled_alike(layers: Sequence[PortableLayer]) -> list[Tensor]:
    """Returns the B of layers for the scaling of the first."""
    first = layers[0]
    factors = [layer.alpha * first.r / (layer.r * first.alpha) for layer in layers]
    return [
        layer.B if factor == 1 else layer.B.to(single_at_least(layer.B.dtype)) * factor
        for layer, factor in zip(layers, factors, strict=True)
    ]


def _check_known(model: nn.Module, layers: Mapping[str, PortableLayer], places: Mapping[str, Place]) -> None:
    """Refuses a model of diffusers without a table, and layers that have no name in that of theirs.

    Raises:
        AdapterFileError: With the class of the model, and the layers.
    """
    cls = base_class_of(model)
    known = places or not TRANSFORMERS.keys().isdisjoint(class_names(model))
    if not known and cls.__module__.startswith("diffusers."):
        raise AdapterFileError(
            f"The original names of the layers of {cls.__name__} are not known. Write format='diffusers', or 'kohya' "
            "where that knows them without a warning."
        )
    named = {name for place in places.values() for name in place.names}
    same = _modules_with_own_names(places)
    unknown = [
        name for name in layers if name not in named and (name in places or not same.get(_around(name, same), True))
    ]
    if unknown:
        raise AdapterFileError(
            f"{listing(unknown)} of {cls.__name__} has no original name that is known, and so no place in this format. "
            "Exclude such layers from the adapter, or write format='diffusers'."
        )


def _modules_with_own_names(places: Mapping[str, Place]) -> dict[str, bool]:
    """Returns of modules that have layers in a table whether they keep a name of their own there.

    What is in such a module and in no table has its own name in both, such as the layers of LTX' attentions beside
    their norms. The model itself is one of them where the modules that it is made of do.
    """
    same: dict[str, bool] = {}
    for original, place in places.items():
        kept = path_starts(original)
        for start in (start for name in place.names for start in path_starts(name)):
            same[start] = same.get(start, False) or start in kept
    outermost = [value for name, value in same.items() if "." not in name]
    return {**same, "": any(outermost)} if outermost else {}


def _around(name: str, modules: Mapping[str, bool]) -> str:
    """Returns the innermost module around a layer that is one of those; the model itself where none is."""
    return next((start for start in path_starts(name)[1:] if start in modules), "")
