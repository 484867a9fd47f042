"""Who owns a name or a module class that several plugins claim: one that overrides, or nobody."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from lora_plugins.errors import PluginError
from lora_plugins.plugins.discovery import BLOCK_VARIABLE
from lora_plugins.plugins.init import InitPlugin
from lora_plugins.plugins.layer import LayerPlugin
from lora_plugins.plugins.registry import Owned, class_path
from lora_plugins.plugins.variant import VariantPlugin

Plugin = TypeVar("Plugin", LayerPlugin, InitPlugin, VariantPlugin)

Claims = Mapping[str, Callable[[Plugin], str]]
"""What an object of a kind owns, by what that is called in messages."""

LAYER_CLAIMS: Claims[LayerPlugin] = {
    "module class": lambda plugin: class_path(plugin.module_type),
    "layer type": lambda plugin: plugin.name,
}
INIT_CLAIMS: Claims[InitPlugin] = {"init": lambda plugin: plugin.name}
VARIANT_CLAIMS: Claims[VariantPlugin] = {"variant": lambda plugin: plugin.name}


def replaced(owned: Iterable[Owned[Plugin]], claims: Claims[Plugin]) -> list[tuple[Owned[Plugin], Owned[Plugin]]]:
    """Returns pairs of an object that is replaced and the one that overrides it.

    Args:
        owned: All registered objects of one kind.
        claims: What an object owns, by what that is called in messages.

    Raises:
        PluginError: If two objects own the same and not exactly one of them overrides, naming both plugins.
    """
    pairs = []
    for kind, claim in claims.items():
        groups: dict[str, list[Owned[Plugin]]] = {}
        for each in owned:
            groups.setdefault(claim(each.plugin), []).append(each)
        for key, group in groups.items():
            pairs += _settle(kind, key, group)
    return pairs


def _settle(kind: str, key: str, group: list[Owned[Plugin]]) -> list[tuple[Owned[Plugin], Owned[Plugin]]]:
    overriding = [each for each in group if each.override]
    rivals = overriding if len(overriding) > 1 else [each for each in group if not each.override]
    if len(rivals) < 2:
        return [(each, overriding[0]) for each in rivals if overriding]
    first, second = rivals[0].info, rivals[1].info
    what = "override" if overriding else "own"
    raise PluginError(
        f"Two plugins {what} the {kind} {key!r}: {first.owner} and {second.owner}. Uninstall one of them, or set "
        f"{BLOCK_VARIABLE}={second.name}. A plugin that is meant to replace the other registers with "
        "registrar.add(..., override=True)."
    )
