"""The class of a layer with stored weights: a subclass of its own, which answers with their dense values."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.inplace.class_cache import once_for_each_class
from lora_plugins.inplace.layer_state import base_class_of, constructor, generated_class
from lora_plugins.inplace.made_again import made_again
from lora_plugins.inplace.stored_weight import stored_weight, stored_weights


def resting_class(layer: nn.Module) -> type[nn.Module]:
    """Returns the class that a layer has without adapters: its own, or one that answers with dense values."""
    base: Any = base_class_of(layer)
    names = tuple(stored_weights(layer))
    cls: type[nn.Module] = stored_class(base, names) if names else base
    return cls


_AT_REST = "_lora_stored_class"
"""Where a generated class names itself, which classes that extend it inherit."""


@once_for_each_class
def stored_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Generates the class of layers whose weights of these names are stored, once for each base class."""
    namespace: dict[str, Any] = {name: _dense(name) for name in names}
    namespace |= {"__init__": constructor(base), "__reduce_ex__": _reduce, "extra_repr": _extra_repr}
    namespace["__jit_unused_properties__"] = [*getattr(base, "__jit_unused_properties__", []), *names]
    namespace["_load_from_state_dict"] = _load_into(base)
    namespace["__setattr__"] = _set
    namespace["forward"] = making_again(_look_up if base is nn.Embedding else base.forward)
    cls = generated_class(f"Stored{base.__name__}", base, namespace)
    setattr(cls, _AT_REST, cls)
    return cls


def making_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Recomputes in the backward the dense values that a forward makes."""

    @functools.wraps(forward)
    def wrapped(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        with made_again():
            return forward(layer, *args, **kwargs)

    return wrapped


def _dense(name: str) -> property:
    def get(layer: nn.Module) -> Tensor:
        stored = stored_weight(layer, name)
        if stored is None:
            raise AttributeError(f"{type(layer).__name__} has no attribute {name!r}")
        return stored.dense()

    return property(get)


def _set(layer: nn.Module, name: str, value: Any) -> None:
    if "_modules" in layer.__dict__ and stored_weight(layer, name) is not None:  # a replica has no attributes at first
        raise StateError(
            f"{name!r} of this {base_class_of(layer).__name__} is stored as "
            f"{stored_weights(layer)[name].storage.plugin.name} and cannot be assigned. Make the model dense first: "
            "unload(dequantize=True)."
        )
    nn.Module.__setattr__(layer, name, value)


def _look_up(layer: nn.Embedding, input: Tensor) -> Tensor:
    """Makes the rows dense that are looked up, and no others."""
    stored = stored_weight(layer, "weight")
    # A class that extends this one, as that of an adapted layer, answers with another weight.
    if stored is None or layer.max_norm is not None or type(layer) is not getattr(layer, _AT_REST):
        return nn.Embedding.forward(layer, input)
    return stored.rows(input)


def _load_into(base: Any) -> Callable[..., None]:
    """Refuses dense values for weights that are stored."""

    def load(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        base._load_from_state_dict(layer, state_dict, prefix, *args)
        errors: list[str] = args[-1]
        errors += [
            f"{prefix + name!r} is stored as {stored.storage.plugin.name} here and dense in the state dict. Load dense "
            "values before they are stored, or make the model dense again: unload(dequantize=True)."
            for name, stored in stored_weights(layer).items()
            if prefix + name in state_dict
        ]

    return load


def _extra_repr(layer: nn.Module) -> str:
    kinds = dict.fromkeys(stored.storage.plugin.name for stored in stored_weights(layer).values())
    return f"{base_class_of(layer).extra_repr(layer)}, stored as {', '.join(kinds)}".removeprefix(", ")


def _reduce(layer: Any, protocol: Any) -> Any:
    # The generated class has no import path; it is made again from its base class.
    return _rebuild, (base_class_of(layer), tuple(stored_weights(layer))), layer.__getstate__()


def _rebuild(base: Any, names: tuple[str, ...]) -> nn.Module:
    generated = stored_class(base, names)
    return generated.__new__(generated)
