"""What stands for a tensor where each row of a batch has values of its own: it tells type and shape, and no value.

Models ask for them without computing with the values, as those of transformers, which cast images to the type of the
first projection. It is no tensor, so that compilers follow what is asked.
"""

from typing import Any, NoReturn

from torch import Tensor

from lora_plugins.errors import StateError

_TELLING = frozenset(
    {
        *("device", "dtype", "is_cpu", "is_cuda", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape"),
        *("dim", "element_size", "get_device", "is_floating_point", "numel", "size"),
    }
)
"""Attributes and methods that give no value."""


class DescribedTensor:
    """Tells what a tensor is like, and raises a `StateError` if it is computed with.

    Args:
        tensor: The tensor.
        refusal: The message of the error.
    """

    def __init__(self, tensor: Tensor, refusal: str) -> None:
        self._tensor, self._refusal = tensor, refusal

    def __getattr__(self, name: str) -> Any:
        if name in _TELLING:
            return getattr(self._tensor, name)
        if name.startswith("_"):  # what Python and its libraries look for in any object
            raise AttributeError(name)
        raise StateError(self._refusal)

    def __len__(self) -> int:
        return len(self._tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise StateError(self._refusal)

    def _refuse(self, *_: Any) -> NoReturn:
        raise StateError(self._refusal)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __pow__ = __getitem__ = __iter__ = __bool__ = __float__ = _refuse
