"""Layers that other libraries adapt by a path beside them, which leaves out a part of what the layer computes."""

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from lora_plugins.errors import listing
from lora_plugins.formats.weights_read import weights_read
from lora_plugins.inplace import NamedModule, base_class_of, full_name, model_modules

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""The layers beside which other libraries put a path."""

_METHODS = ("forward", "_conv_forward")


def warn_of_second_paths(model: nn.Module, modules: Mapping[str, NamedModule], outcome: str) -> None:
    """Warns of layers that PEFT and similar libraries compute differently until merged, and of the outcome of that."""
    in_lists, readers = _names_in_lists(model), weights_read(model)
    found: dict[str, list[str]] = {}
    for name, entry in modules.items():
        others = [each for each in (*entry.names, *in_lists.get(id(entry.module), ())) if each != name]
        reader = next((readers[each] for each in entry.names if each in readers), None)
        if left_out := _left_out(entry.module, others, reader):
            found.setdefault(left_out, []).append(name)
    for left_out, names in found.items():
        warnings.warn(
            f"{listing(names)}: PEFT can compute something else before merging than after, as its second path leaves "
            f"out {left_out}. {outcome}",
            stacklevel=2,
        )


def _names_in_lists(model: nn.Module) -> dict[int, list[str]]:
    """Returns the names of modules in plain lists: a model that calls them from there bypasses a wrapper."""
    found: dict[int, list[str]] = {}
    for entry in model_modules(model):
        for key, value in vars(entry.module).items():
            for at, each in enumerate(value if isinstance(value, list | tuple) else ()):
                if isinstance(each, nn.Module):
                    found.setdefault(id(each), []).append(full_name(entry.name, f"{key}[{at}]"))
    return found


def _left_out(module: nn.Module, others: Sequence[str], reader: str | None) -> str:
    """Returns what a second path leaves out of a layer; empty where it is the layer's own computation.

    The layer may be called by `others`, further names of it, and its weight may be computed with by a class, `reader`.
    """
    if others:
        return f"what calls the layer as {listing(others)}"
    if reader is not None:
        return f"what {reader} computes with the weight itself"
    cls = base_class_of(module)
    known = next((layer for layer in LAYERS if issubclass(cls, layer)), None)
    if known is None:
        return ""
    if any(getattr(cls, m, None) is not getattr(known, m, None) for m in _METHODS):
        return f"the forward of {cls.__name__}"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "the padding mode"
    steps = zip(getattr(module, "dilation", ()), getattr(module, "kernel_size", ()), strict=True)
    if any(step > 1 and size > 1 for step, size in steps):
        return "the dilation"
    return "" if getattr(module, "max_norm", None) is None else "max_norm"
