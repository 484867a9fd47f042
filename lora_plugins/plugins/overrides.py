"""Who owns what several plugins claim: the one that overrides, or none."""

from collections.abc import Callable, Iterable

from lora_plugins.names import DISTRIBUTION
from lora_plugins.plugins.discovery import BLOCK_VARIABLE
from lora_plugins.plugins.kind import P, PluginKind
from lora_plugins.plugins.owned import Owned


def replaced(kind: PluginKind[P], owned: Iterable[Owned[P]]) -> tuple[list[tuple[Owned[P], Owned[P]]], list[str]]:
    """Decides which plugin owns what.

    Args:
        kind: The kind.
        owned: All its registered objects.

    Returns:
        Pairs of an object that is replaced and the one that overrides it; and a sentence for each clash, where two
        objects own the same and not exactly one of them overrides, naming both plugins.
    """
    pairs, clashes = [], []
    for what, claim in kind.claims.items():
        for key, group in grouped(claim, owned).items():
            overriding = [each for each in group if each.override]
            rivals = overriding if len(overriding) > 1 else [each for each in group if not each.override]
            if len(rivals) > 1:
                clashes.append(_clash(what, key, rivals, "override" if overriding else "own"))
            elif overriding:
                pairs += [(each, overriding[0]) for each in rivals]
    return pairs, clashes


def grouped(claim: Callable[[P], str], owned: Iterable[Owned[P]]) -> dict[str, list[Owned[P]]]:
    """Returns the objects by what they claim."""
    groups: dict[str, list[Owned[P]]] = {}
    for each in owned:
        groups.setdefault(claim(each.plugin), []).append(each)
    return groups


def _clash(what: str, key: str, rivals: list[Owned[P]], verb: str) -> str:
    first, second = rivals[0].info, rivals[1].info
    way = "Uninstall one of them" if first.installed and second.installed else "Leave one of them out"
    for info in (second, first):
        if info.installed and info.distribution != DISTRIBUTION:  # others cannot be blocked
            way += f", or set {BLOCK_VARIABLE}={info.full_name if first.name == second.name else info.name}"
            break
    return (
        f"Two plugins {verb} the {what} {key!r}: {first.owner} and {second.owner}. {way}. A plugin that is meant to "
        "replace the other registers with registrar.add(..., override=True)."
    )
