"""How hooks of autograd keep tensors that are saved for a backward, and how hooks of others are kept out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

saved_tensors_take_hooks: Callable[[], bool] = getattr(
    torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: False
)
"""Whether hooks are allowed, which torch has no public way of asking; without its private one, they are not used."""


class KeptTensor:
    """A saved tensor that a hook keeps as it is, with the check that torch makes itself where there is no hook.

    Args:
        tensor: The tensor. Its graph is not kept: an operation that saves its own output would keep itself alive.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def again(self) -> Tensor:
        """Returns the tensor.

        Raises:
            RuntimeError: If it was changed in place.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self._tensor.type()} {list(self._tensor.shape)} is at version {self._tensor._version}; expected "
                f"version {self._version} instead."
            )
        return self._tensor


def without_hooks_of_others() -> AbstractContextManager[object]:
    """Returns a block in which tensors are saved as they are, whatever hooks act around it."""
    return saved_tensors_hooks(KeptTensor, KeptTensor.again) if saved_tensors_take_hooks() else nullcontext()
