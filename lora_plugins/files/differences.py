"""Differences between an adapter of a model and one of a file, whose values are about to replace its own."""

from collections.abc import Mapping
from typing import Any

from lora_plugins.files.fingerprint import same
from lora_plugins.plugins import PackedAdapter


def differing_config(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Says which fields of two configurations of manifests differ, with both values; empty where none does."""
    different = [name for name in here if here[name] != there.get(name)]
    return "; ".join(f"{name} is {there.get(name)!r} in the file and {here[name]!r} here" for name in different)


def differing_base(own: PackedAdapter, saved: PackedAdapter) -> list[str]:
    """Returns the names of the adapted weights, and of all stored ones, that are not those of the file's base."""
    here, there = own.manifest["base"], saved.manifest["base"]
    wrong = [name for name in here if name not in there or not same(here[name], there[name])]
    mine, theirs = own.manifest.get("stored", {}), saved.manifest.get("stored", {})
    return wrong + [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]


def by_same_plugins(own: PackedAdapter, saved: PackedAdapter) -> bool:
    """Whether two adapters have the same layers, by the same plugins: one may have been installed since."""
    here, there = ({name: layer["plugin"] for name, layer in each.manifest["layers"].items()} for each in (own, saved))
    return here == there
