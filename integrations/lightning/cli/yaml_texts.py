"""YAML as jsonargparse reads it, and stricter: 1e-3 is a number, and a key that comes twice in a table is refused."""

import re
from typing import Any

import yaml

_TAKES_OVER = "tag:yaml.org,2002:merge"
"""The tag of `<<`, which may come more than once: nothing of it is lost."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # of a package without types
    """Reads 1e-3 and 1.5e3 as numbers, as jsonargparse does, and refuses keys that come twice, which YAML forbids."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reads a table, before what it takes over from others by `<<` is put beside its own keys.

        Raises:
            ComposerError: If a key comes twice, with the place of the second.
        """
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen and key.tag != _TAKES_OVER:
                said = f"the key {key.value!r} comes twice in one table"
                raise yaml.composer.ComposerError(None, None, said, key.start_mark)
            seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


def load_yaml(text: str) -> Any:
    """Returns what a text holds.

    Raises:
        yaml.YAMLError: If it is not YAML, or a key comes twice.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def parsed_yaml(text: str) -> Any:
    """Returns what a text holds; the text itself if it is not YAML."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
