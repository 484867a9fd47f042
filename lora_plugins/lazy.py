"""Names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(
    package: str, modules: Mapping[str, str], elsewhere: Mapping[str, str] | None = None, *, extra: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and the `__dir__` of a package whose names live in its modules (PEP 562).

    Args:
        package: Full name of the package.
        modules: By public name, the module of the package that holds it.
        elsewhere: By names that packages of others have, what to write here. Asking for one is an `ImportError`, as
            Python replaces the message of an `AttributeError` in `from package import name`.
        extra: The extra that installs what the modules import; a `ModuleNotFoundError` says so.
    """

    def get(name: str) -> Any:
        if elsewhere is not None and name in elsewhere:
            raise ImportError(f"{package} has no {name!r}. {elsewhere[name]}", name=name)
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        except ModuleNotFoundError as error:
            if not extra:
                raise
            text = f"{package}.{name} needs {error.name}. Run: pip install 'lora-plugins[{extra}]'"
            raise ModuleNotFoundError(text, name=error.name) from error

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, listed
