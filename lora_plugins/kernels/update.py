"""What kernels are told of a layer's update."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Update(Protocol):
    """`scaling · B A`, which is added to the weight of a layer."""

    @property
    def A(self) -> Tensor:  # noqa: N802  # as in every paper
        """`(r, in)`, where in counts the elements of a row of the weight."""

    @property
    def B(self) -> Tensor:  # noqa: N802
        """`(out, r)`."""

    @property
    def scaling(self) -> float:
        """Factor of `B A`."""

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of the branch's input."""

    @property
    def low_memory(self) -> bool:
        """Whether a kernel may compute the layer's input again in the backward instead of saving it."""


class Rescaling(Protocol):
    """A function of the updated weight, `W + scaling · B A`, that its rows are multiplied by."""

    @property
    def own(self) -> Sequence[Tensor]:
        """Tensors that it is differentiable in."""

    @property
    def factors(self) -> Callable[..., Tensor]:
        """Returns `f`, `(out,)`, from the updated weight, `(out, in)`, detached, and its own tensors."""
