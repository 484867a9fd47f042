"""Inputs of classes that extend `torch.Tensor`, as those of MONAI, torchvision and fastai do, or that wrap a tensor.

The untouched layer is one operation for such a class: its `__torch_function__` is called once, and its own methods,
which it may have replaced or not have, not at all. The many operations of an adapted layer are none of its business
either.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

_NO_DISPATCH = Tensor.__torch_dispatch__


def as_one_operation(compute: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Computes with a plain tensor in place of the first argument; its class makes what it likes of the result.

    A class that wraps a tensor, such as the points of torchphysics, hands it over itself. Classes that act below
    autograd, by `__torch_dispatch__`, are no plain tensors underneath, and get each operation.
    """
    if not args or type(args[0]) is Tensor or not _is_extended(args[0]):
        return compute(*args, **options)

    def adapted_layer(x: Any, /, *others: Any, **options: Any) -> Any:
        if type(x) is not Tensor and _is_extended(x):  # modes, as that of a default device, come first and call this
            return handle_torch_function(adapted_layer, (x,), x, *others, **options)
        return compute(x.as_subclass(Tensor) if isinstance(x, Tensor) else x, *others, **options)

    return adapted_layer(*args, **options)


def _is_extended(x: Any) -> bool:
    return (
        not is_compiling()  # compilers know such classes, and see through plain calls only
        and has_torch_function_unary(x)
        and getattr(type(x), "__torch_dispatch__", _NO_DISPATCH) is _NO_DISPATCH
    )
