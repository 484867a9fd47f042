"""A stand-in for a tensor: it tells type and shape, and refuses to be computed with.

It is read where no single tensor would be right: in a mixed batch, whose rows have values of their own, and where a
compiler traces the weight of a layer with dropout. Models may still ask for type and shape; those of transformers cast
images to the type of the first projection. It is no `Tensor`, so that compilers can trace these questions. Passed to
the function of its layer, as in `F.linear(x, layer.weight)`, it computes what the layer does.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.inplace.called_weight import arguments, call, is_call

TELLING = frozenset(
    {
        *("device", "dtype", "is_cpu", "is_cuda", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape"),
        *("dim", "element_size", "get_device", "is_floating_point", "numel", "size"),
    }
)
"""Attributes and methods that say nothing of the values."""


_CASTING = (Tensor.to, Tensor.type_as)
"""Functions of a tensor that take nothing but type and device of another one."""


class DescribedTensor:
    """Tells type and shape of a tensor, and raises a `StateError` if it is computed with.

    Args:
        tensor: The tensor.
        refusal: The message of the error.
        layer: The layer whose weight it is; None if it is another tensor.
    """

    def __init__(self, tensor: Tensor, refusal: str, layer: nn.Module | None = None) -> None:
        self._tensor, self._refusal, self._layer = tensor, refusal, layer

    def __getattr__(self, name: str) -> Any:
        if name in TELLING:
            return getattr(self._tensor, name)
        if name.startswith("_"):  # what Python and its libraries look for in any object
            raise AttributeError(name)
        raise StateError(self._refusal)

    def __len__(self) -> int:
        return len(self._tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        given = arguments(args, kwargs)
        weight = given.get("weight")
        if isinstance(weight, cls) and weight._layer is not None and is_call(weight._layer, func):
            return call(weight._layer, given)
        if func in _CASTING and not kwargs:
            return cast(Tensor, func(args[0], *(each._tensor if type(each) is cls else each for each in args[1:])))
        raise StateError(next(_among((*args, *(kwargs or {}).values())))._refusal)

    def _refuse(self, *_: Any) -> NoReturn:
        raise StateError(self._refusal)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __pow__ = __getitem__ = __iter__ = __bool__ = __float__ = _refuse


class _CountedAsTensor(DescribedTensor):
    """One that `isinstance` takes for a tensor: T5 and Pix2Struct cast to the type of a weight only then."""

    __class__ = property(lambda self: Tensor)


def described(tensor: Tensor, refusal: str, layer: nn.Module | None = None) -> DescribedTensor:
    """Returns the stand-in for a tensor; arguments as in `DescribedTensor`."""
    # Compilers would look for its attributes in the class that it says it has.
    kind = DescribedTensor if torch.compiler.is_compiling() else _CountedAsTensor
    return kind(tensor, refusal, layer)


def _among(values: Iterable[Any]) -> Iterator[DescribedTensor]:
    """Yields the stand-ins among the arguments of a function, also in lists."""
    for value in values:
        if isinstance(value, DescribedTensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _among(value)
