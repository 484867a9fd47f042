"""Recomputes in the backward the dense values that a forward made of stored weights, instead of keeping them.

Whatever a layer's own forward saves for its backward passes through a hook of autograd. What lies in the memory of such
a dense value is replaced by a note of how to make it. Everything else goes to the hook that acts around the layer, such
as that of gradient checkpointing; where there is none it is kept as it is, with the check for changes in place that
torch makes itself where there is no hook.

Compilers take no hooks, and what transforms and dual numbers compute with has no memory of its own, so there dense
values are kept. torch has no public way of asking for hooks; without its private one, they are kept too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling

from lora_plugins.utils import KeptTensor, saved_tensors_take_hooks, transforms_are_active

_top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

Make = Callable[[], Tensor]
"""Makes a dense value, or any saved tensor, again."""


class _Pack:
    """What autograd calls with each tensor that it is about to save; returns what gives the tensor again.

    Args:
        around: The hooks that act around; none if there are none.
    """

    def __init__(self, around: Any) -> None:
        self.made: dict[int, tuple[Make, Tensor]] = {}
        self._around = around
        if around:
            self.__module__ = around[0].__module__  # by which `kernels.entries.recompute` tells whose hooks act

    def __call__(self, tensor: Tensor) -> Make:
        has_place = tensor.layout is torch.strided  # a sparse tensor has none, and is no dense value
        found = self.made.get(tensor.untyped_storage().data_ptr()) if self.made and has_place else None
        if found is None or found[1].dtype != tensor.dtype:
            if self._around:
                return partial(self._around[1], self._around[0](tensor))
            return KeptTensor(tensor).again
        return partial(_view, found[0], tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


def _view(make: Make, dtype: torch.dtype, *place: Any) -> Tensor:
    return make().to(dtype).as_strided(*place)


class _MadeAgain(saved_tensors_hooks):
    def __init__(self, around: Any) -> None:
        self._pack = _Pack(around)
        super().__init__(self._pack, lambda again: again())

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._pack.made.clear()


def made_again() -> AbstractContextManager[object]:
    """Recomputes dense values that are made inside the block in the backward, instead of keeping them."""
    if _top is None or not _takes_hooks() or not torch.is_grad_enabled() or not saved_tensors_take_hooks():
        return nullcontext()
    around = _top(True)
    return nullcontext() if around and isinstance(around[0], _Pack) else _MadeAgain(around)


def note(dense: Tensor, make: Make) -> Tensor:
    """Records a dense value that is made inside of `made_again`, and what makes it again; returns the value."""
    if _top is not None and _takes_hooks() and (hooks := _top(True)) and isinstance(hooks[0], _Pack):
        hooks[0].made[dense.untyped_storage().data_ptr()] = make, dense
    return dense


def _takes_hooks() -> bool:
    return not is_compiling() and not transforms_are_active()
