"""Tensors that tell their type and shape and nothing else: where each row of a batch has values of its own.

Models ask for them without computing with the values, as those of transformers, which cast images to the type of the
first projection.
"""

import functools
from typing import Any, ClassVar

from torch import Tensor

from lora_plugins.errors import StateError

_TELLING = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "ndim", "requires_grad", "shape")),
        *(getattr(Tensor, name) for name in ("dim", "element_size", "is_floating_point", "numel", "size", "__len__")),
    }
)
"""What can be asked."""


def described_tensor(tensor: Tensor, refusal: str) -> Tensor:
    """Returns a tensor that tells what another one is like, and raises a `StateError` if it is computed with.

    Args:
        tensor: The other one.
        refusal: The message of the error.
    """
    return tensor.detach().as_subclass(_class_with(refusal))


class _DescribedTensor(Tensor):
    refusal: ClassVar[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _TELLING:
            raise StateError(cls.refusal)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


@functools.cache
def _class_with(refusal: str) -> type[Tensor]:
    return type("DescribedTensor", (_DescribedTensor,), {"refusal": refusal})
