"""Which kernels there are, which of them are used in this process, and why others are not.

Kernels are found by walking the folder `entries`. Deleting a file there removes its kernels; nothing else names them.
"""

import functools
import importlib
import os
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lora_plugins.errors import ConfigError, near
from lora_plugins.kernels._kernel import Kernel
from lora_plugins.utils import ending

DISABLE_VARIABLE = "LORA_PLUGINS_DISABLE_KERNELS"
"""Environment variable with the names of kernels that are not used, separated by commas, or `all`."""

_ALL = "all"
_FOLDER = "lora_plugins.kernels.entries"


@dataclass(frozen=True)
class KernelStatus:
    """Whether a kernel is used in this process.

    Args:
        name: Of the kernel.
        operations: The operations that it computes.
        reason: Why it is not used; empty if it is.
    """

    name: str
    operations: tuple[str, ...]
    reason: str

    @property
    def used(self) -> bool:
        """Whether calls that the kernel applies to are computed by it."""
        return not self.reason


def kernel_report() -> list[KernelStatus]:
    """Returns the status of every kernel, by name.

    Raises:
        ConfigError: If the environment variable names a kernel that does not exist.
    """
    return _switches().report()


@contextmanager
def disabled_kernels(*names: str) -> Iterator[None]:
    """Switches kernels off for the duration of a block, in the whole process; for tests and benchmarks.

    Put whole training steps into the block: what gradient checkpointing computes again after it may differ.

    Args:
        *names: Names of kernels, or `all`.

    Raises:
        ConfigError: If there is no kernel of such a name.
    """
    switches = _switches()
    before = switches.disabled
    named = switches.named(names, "disabled_kernels")
    with ending(lambda: switches.switch(before)):
        switches.switch({**before, **named})
        yield


def active_kernels(operation: str) -> Sequence[Kernel]:
    """Returns the kernels of an operation that are used in this process, in the order in which they are tried.

    Raises:
        ConfigError: If the environment variable names a kernel that does not exist.
    """
    return _switches().active.get(operation, ())


class _Switches:
    """The kernels of this process, and what switches some of them off.

    Args:
        kernels: All of them.
    """

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.kernels = kernels
        self.unavailable = {kernel.name: why for kernel in kernels if (why := kernel.available())}
        listed = filter(None, map(str.strip, os.environ.get(DISABLE_VARIABLE, "").split(",")))
        self.switch(self.named(listed, DISABLE_VARIABLE))

    def report(self) -> list[KernelStatus]:
        """Returns the status of every kernel, by name."""
        operations: dict[str, tuple[str, ...]] = {}
        for kernel in self.kernels:
            operations[kernel.name] = (*operations.get(kernel.name, ()), kernel.operation)
        return [KernelStatus(name, operations[name], self.reasons.get(name, "")) for name in sorted(operations)]

    def named(self, names: Iterable[str], by: str) -> Mapping[str, str]:
        """Returns which kernels are switched off by what, for names that may be `all`."""
        known = {kernel.name for kernel in self.kernels}
        chosen = {*names}
        for name in sorted(chosen - known - {_ALL}):
            raise ConfigError(f"{by} names {name!r}, which is not a kernel. {near(name, known | {_ALL})}")
        return dict.fromkeys(known if _ALL in chosen else chosen, by)

    def switch(self, disabled: Mapping[str, str]) -> None:
        """Uses all available kernels but those that something switches off, here by their names."""
        self.disabled = disabled
        self.reasons = {**self.unavailable, **{name: f"switched off by {by}" for name, by in disabled.items()}}
        used = [kernel for kernel in self.kernels if kernel.name not in self.reasons]
        operations = {kernel.operation for kernel in used}
        self.active = {name: tuple(kernel for kernel in used if kernel.operation == name) for name in operations}


@functools.cache
def _switches() -> _Switches:
    return _Switches(_entries())


def _entries() -> tuple[Kernel, ...]:
    """Imports the files of the folder, in the order of their names, and returns their kernels."""
    folder = importlib.import_module(_FOLDER)
    modules = [importlib.import_module(f"{_FOLDER}.{info.name}") for info in pkgutil.iter_modules(folder.__path__)]
    return tuple(kernel for module in modules for kernel in module.KERNELS)
