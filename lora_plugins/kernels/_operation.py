"""Operations: what adapted layers compute, by the first kernel that applies or else by ordinary torch operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch.compiler import is_compiling

from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels._switches import active_kernels

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Operation(Generic[P, R]):
    """A function that kernels may compute.

    Args:
        name: What kernels call it.
        plain: Computes it in ordinary torch operations, which compilers, tracers and transforms see through.
        compiled: Computes it for compilers, as an operator that they know; None for a call that it does not compute.
    """

    name: str
    plain: Callable[P, R]
    compiled: Callable[P, R | None] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Computes it by the first kernel that applies."""
        # First, so that a compiler does not see how kernels are chosen.
        if is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            found = None if self.compiled is None else self.compiled(*args, **kwargs)
            return self.plain(*args, **kwargs) if found is None else found
        for kernel in active_kernels(self.name):
            if kernel.applies(*args, **kwargs):
                return cast(R, kernel.run(*args, **kwargs))
        return self.plain(*args, **kwargs)

    def find(self, *args: Any, **kwargs: Any) -> Kernel | None:
        """Returns the kernel that would compute a call in eager mode; None if ordinary operations would."""
        return _first(active_kernels(self.name), args, kwargs)

    def pinned(self) -> Callable[P, R]:
        """Returns the operation with the kernels that are used now, whatever is switched later."""
        kernels, plain = active_kernels(self.name), self.plain

        def compute(*args: P.args, **kwargs: P.kwargs) -> R:
            kernel = _first(kernels, args, kwargs)
            return plain(*args, **kwargs) if kernel is None else cast(R, kernel.run(*args, **kwargs))

        return compute


def operation(plain: Callable[P, R]) -> Operation[P, R]:
    """Makes an operation of the function that computes it in ordinary torch operations."""
    return Operation(plain.__name__, plain)


def operation_compiled_by(compiled: Callable[P, R | None]) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Makes operations that compilers compute by a function of its own."""
    return lambda plain: Operation(plain.__name__, plain, compiled)


def _first(kernels: Sequence[Kernel], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kernel | None:
    return next((kernel for kernel in kernels if kernel.applies(*args, **kwargs)), None)
