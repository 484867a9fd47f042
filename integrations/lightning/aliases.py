"""Lets `pytorch_lightning` be an alias of `lightning.pytorch`, so that packages that import it get the same classes.

Both are built from one source, and a Trainer of the one refuses modules of the other.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from lora_plugins import StateError

ALIASES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""By the name of a package, the package that is imported in its place."""


def alias_pytorch_lightning() -> None:
    """Makes every later `import pytorch_lightning` an import of `lightning.pytorch`.

    Call it before the first package is imported that imports `pytorch_lightning`. Then modules of that package are
    LightningModules for `lightning.pytorch.Trainer` and for `LoraCallback`, without a change. Calling it again does
    nothing.

    Raises:
        StateError: If `pytorch_lightning` has been imported already, under its own name.
    """
    if _is_set():
        return
    present = [name for name in ALIASES if name in sys.modules]
    if present:
        raise StateError(
            f"{present[0]} has been imported already, so there are classes of it. Call alias_pytorch_lightning() "
            "before the import of the package that imports it."
        )
    sys.meta_path.insert(0, _Finder())


def alias_in_use() -> bool:
    """Whether something has imported an alias in place of the package itself."""
    return _is_set() and bool(ALIASES.keys() & sys.modules.keys())


@contextmanager
def pytorch_lightning_aliased() -> Iterator[None]:
    """Sets the alias for the duration of the block, unless `pytorch_lightning` is imported or aliased already."""
    if _is_set() or ALIASES.keys() & sys.modules.keys():
        yield
        return
    alias_pytorch_lightning()
    try:
        yield
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        for name in [name for name in sys.modules if name.partition(".")[0] in ALIASES]:
            del sys.modules[name]


def _is_set() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of an alias, which is the module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns a specification for the modules of an alias only."""
        if fullname.partition(".")[0] not in ALIASES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Imports the module under its own name."""
        alias, dot, rest = spec.name.partition(".")
        name = ALIASES[alias] + dot + rest
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name) from error
            raise
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restores the module's own specification, which Python has replaced by that of the alias."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
