"""Layers whose own forward writes into the weight that it computes with: masked convolutions, bounded norms.

`self.weight.data *= self.mask` acts on the tensor that this reading gives, and the next reading would give a new one.
So all readings inside of one call of such a forward give the same tensor.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.inplace.layer_state import layer_state


@dataclass(frozen=True)
class _Held:
    """What the weights of a layer gave in this call of its forward, by name; and whether the call records gradients.

    The first reading may be inside of `torch.no_grad()`, for the writing.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    with_gradients: bool = field(default_factory=torch.is_grad_enabled)


@functools.cache
def writes_weights(base: type[nn.Module], weights: tuple[str, ...]) -> bool:
    """Whether the forward of a class, or a method that it may call, writes into its weights, by what its code names.

    `weight.data`, or a method of the weight that ends in `_`, is enough: holding what nothing writes into changes
    nothing.
    """
    if not weights:
        return False
    own = [cls for cls in base.__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins")]
    writes = re.compile(rf"\.({'|'.join(weights)})\.(data\b|\w+_\()")
    return any(writes.search(code) for cls in own for code in _codes(cls))


def _codes(cls: type) -> Iterator[str]:
    """Yields the code of the methods of a class that a forward may call."""
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and not re.search("init|reset", name):
            try:
                yield inspect.getsource(method)
            except OSError:  # there is no file
                continue


def holding(own: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a forward inside of which every reading of a weight gives the same tensor."""

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls, thread = layer_state(layer).held, get_ident()
        if thread in calls:  # it calls itself
            return own(layer, *args, **kwargs)
        calls[thread] = _Held()
        try:
            return own(layer, *args, **kwargs)
        finally:
            del calls[thread]

    return forward


def held(layer: nn.Module, name: str, make: Callable[[nn.Module, str], Tensor]) -> Tensor:
    """Returns the weight that a running forward has read before, or a new one that `make` gives."""
    calls = layer_state(layer).held
    now: _Held | None = calls.get(get_ident()) if calls else None
    if now is None:
        return make(layer, name)
    if name not in now.weights:
        with torch.set_grad_enabled(now.with_gradients):
            now.weights[name] = make(layer, name)
    return now.weights[name]
