"""Who owns what several plugins claim: the one that overrides, or nobody."""

from collections.abc import Callable, Iterable

from lora_plugins.errors import PluginError
from lora_plugins.plugins.discovery import BLOCK_VARIABLE
from lora_plugins.plugins.kind import P, PluginKind
from lora_plugins.plugins.registry import Owned


def replaced(kind: PluginKind[P], owned: Iterable[Owned[P]]) -> list[tuple[Owned[P], Owned[P]]]:
    """Returns pairs of an object that is replaced and the one that overrides it.

    Args:
        kind: The kind.
        owned: All its registered objects.

    Raises:
        PluginError: If two objects own the same and not exactly one of them overrides, naming both plugins.
    """
    pairs = []
    for what, claim in kind.claims.items():
        for key, group in _grouped(claim, owned).items():
            pairs += _settle(what, key, group)
    return pairs


def _grouped(claim: Callable[[P], str], owned: Iterable[Owned[P]]) -> dict[str, list[Owned[P]]]:
    groups: dict[str, list[Owned[P]]] = {}
    for each in owned:
        groups.setdefault(claim(each.plugin), []).append(each)
    return groups


def _settle(what: str, key: str, group: list[Owned[P]]) -> list[tuple[Owned[P], Owned[P]]]:
    overriding = [each for each in group if each.override]
    rivals = overriding if len(overriding) > 1 else [each for each in group if not each.override]
    if len(rivals) < 2:
        return [(each, overriding[0]) for each in rivals if overriding]
    first, second = rivals[0].info, rivals[1].info
    verb = "override" if overriding else "own"
    raise PluginError(
        f"Two plugins {verb} the {what} {key!r}: {first.owner} and {second.owner}. Uninstall one of them, or set "
        f"{BLOCK_VARIABLE}={second.name}. A plugin that is meant to replace the other registers with "
        "registrar.add(..., override=True)."
    )
