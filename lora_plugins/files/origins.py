"""The plugins that an adapter was made with, and whether they are installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lora_plugins.config import LoraConfig
from lora_plugins.errors import AdapterFileError
from lora_plugins.names import DISTRIBUTION
from lora_plugins.plugins import INITS, LAYERS, STORAGES, UNVERSIONED, VARIANTS, PluginKind, Registry, versioned

TO_HAVE_IT = "Install it, let it load, or give it in code: registry=build_registry([(name, plugin)])."
"""What to do about a plugin that is not here."""

Origin = Mapping[str, Any]
"""The name of a plugin's object, and the distribution and version that it came from, as far as they were known."""


def origin(registry: Registry, kind: PluginKind[Any], name: str) -> dict[str, str]:
    """Returns what a manifest says of where an object of a plugin came from."""
    owned = registry.of(kind).get(name)
    return {"distribution": owned.info.distribution, "version": owned.info.version} if owned else {}


def whose(found: Origin) -> str:
    """Returns the distribution and version of an object of a plugin, for messages."""
    if not found.get("distribution"):
        return "an unknown distribution"
    return versioned(found["distribution"], found.get("version") or UNVERSIONED)


def check_origins(manifest: Mapping[str, Any], config: LoraConfig, registry: Registry) -> None:
    """Checks that the plugins of an adapter are installed, and that its manifest does not contradict itself about them.

    Raises:
        AdapterFileError: If one is missing, naming the distribution that brought it, or the manifest's entries are not
            those of its config.
    """
    for key, asked in (("init", config.init), ("variant", config.variant)):
        name = manifest[key]["name"]
        if name != asked:
            raise AdapterFileError(
                f"The manifest says that the adapter was made with the {key} {name!r}, and its config {asked!r}: one "
                "of them was changed. Copy the adapter again."
            )
    missing = dict.fromkeys(
        f"the {kind.title} {found['name']!r} of {whose(found)}"
        for kind, found in _origins(manifest)
        if found["name"] not in registry.of(kind) and found["name"] not in kind.reserved
    )
    if missing:
        raise AdapterFileError(
            f"The adapter was made with {', '.join(missing)}, which is not here. {TO_HAVE_IT}{registry.absent()}"
        ) from registry.cause()


@contextmanager
def versions_told(manifest: Mapping[str, Any], registry: Registry) -> Iterator[None]:
    """Adds the third-party plugins that have changed since to an error that an adapter does not fit.

    Raises:
        AdapterFileError: The error of the block, with them.
    """
    try:
        yield
    except AdapterFileError as error:
        others = dict.fromkeys(
            f"the {kind.title} {found['name']!r} of {whose(found)}, and here is that of {whose(here)}"
            for kind, found in (*_origins(manifest), *_storages(manifest))
            if found.get("distribution") not in (None, DISTRIBUTION)
            if (here := origin(registry, kind, found["name"])) and whose(here) != whose(found)
        )
        if not others:
            raise
        raise AdapterFileError(f"{error} It was made with {'; '.join(others)}: that may be why.") from error


def _storages(manifest: Mapping[str, Any]) -> Iterator[tuple[PluginKind[Any], Origin]]:
    for entry in (manifest.get("stored") or {}).values():
        yield STORAGES, {**entry, "name": str(entry.get("storage"))}


def _origins(manifest: Mapping[str, Any]) -> Iterator[tuple[PluginKind[Any], Origin]]:
    yield INITS, manifest["init"]
    yield VARIANTS, manifest["variant"]
    for layer in manifest["layers"].values():
        yield LAYERS, {**layer, "name": layer["plugin"]}
