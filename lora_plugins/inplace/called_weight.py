"""Weights that another module passes to the layer's function, instead of calling the layer.

The attention of BEiT, EVA and Swin calls `F.linear(x, self.qkv.weight, bias)`, with a bias of its own. Dropout, and
adapters of single rows of a batch, depend on the input, so no weight can hold them. Such a weight recognizes this call,
by `__torch_function__`, and computes what the layer would.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from lora_plugins.errors import StateError
from lora_plugins.inplace.by_plugin import by_plugin
from lora_plugins.inplace.layer_state import layer_state, state_of
from lora_plugins.inplace.weights import LazyWeightsOf

_NAMES = ("input", "weight", "bias")
"""What the functions take, in this order."""


class CalledWeight(Tensor):
    """The effective weight of a layer with dropout; it knows its layer, and itself as a plain tensor."""

    layer: nn.Module
    plain: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = arguments(args, kwargs)
        weight = given.get("weight")
        if isinstance(weight, cls) and is_call(weight.layer, func):
            return call(weight.layer, given)
        # Plain tensors, and no context in which there are no classes: compilers would go round in circles for `w.T`.
        return func(*_plain(args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def called_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns the effective weight of a layer with dropout, with which the layer's function computes the layer.

    A backward through any other use of it raises a `StateError`.
    """
    if weight.requires_grad:
        weight.register_hook(_RefuseDropout(layer_state(layer).name))  # type: ignore[no-untyped-call]
    called = weight.as_subclass(CalledWeight)
    called.layer, called.plain = layer, weight
    return called


def _plain(value: Any) -> Any:
    """Replaces such weights in an argument of a function by plain tensors, also in lists."""
    if isinstance(value, CalledWeight):
        return value.plain
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns by name the arguments of a function of input, weight and bias."""
    # Of equal lengths: compilers of torch 2.8 know no other `zip`.
    return dict(zip(_NAMES[: len(args)], args[: len(_NAMES)], strict=True)) | dict(kwargs or {})


def is_call(layer: nn.Module, func: Callable[..., Any]) -> bool:
    """Whether a function of torch, called with the weight of a layer, computes what the layer does."""
    state = state_of(layer)
    branch = None if state is None else state.branch  # it was unloaded after its weight was read
    return branch is not None and func is type(branch.plugin).function


def call(layer: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """Computes what a layer does, with another bias, from what its function is called with."""
    branch = layer_state(layer).branch
    assert branch is not None
    shown = _WithBias(layer, given.get("bias"))
    weights = LazyWeightsOf(layer, branch.tensors)
    return cast(Tensor, by_plugin(layer, branch, weights, (given["input"],), {}, shown=shown))


class _WithBias:
    """A layer with the bias that the caller of its function gives."""

    def __init__(self, layer: nn.Module, bias: Tensor | None) -> None:
        self._layer, self.bias = layer, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def no_dropout(layer: str) -> str:
    """Explains why a weight cannot be used outside of its layer's forward in training."""
    return (
        f"The weight of {layer!r} is used by another module without calling the layer, so dropout cannot act on it. "
        "Set dropout=0, or add the layer to exclude_modules."
    )


@unserializable_hook  # a weight that is saved needs none
@dataclass(frozen=True)
class _RefuseDropout:
    """Stops a backward through a weight that was read outside of the layer's forward, where no dropout can act."""

    layer: str

    def __call__(self, gradient: Tensor) -> None:
        raise StateError(no_dropout(self.layer))
