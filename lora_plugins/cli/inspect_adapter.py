"""`lora-plugins inspect PATH`: what is in an adapter file of any format, without a model."""

from argparse import Namespace
from pathlib import Path

from lora_plugins.cli.text import table
from lora_plugins.errors import counted
from lora_plugins.files import format_of
from lora_plugins.hub import located
from lora_plugins.plugins import AdapterSummary


def run(given: Namespace) -> int:
    """Prints what is in a file.

    Raises:
        AdapterFileError: If it is damaged, or of no format.
    """
    path = located(given.path)
    found = format_of(path)
    print(described(path, found.name, found.summary(path)))
    return 0


def described(path: Path, format_name: str, summary: AdapterSummary) -> str:
    """Returns the lines on one adapter."""
    details = {"format": format_name, **summary.details, "bytes": f"{_size(path):,}"}
    layers = [("layer", "r", "alpha", "elements")]
    layers += [(each.name, str(each.r), f"{each.alpha:g}", f"{each.elements:,}") for each in summary.layers]
    values = [("trained in full", "elements"), *((name, f"{size:,}") for name, size in summary.values.items())]
    count, total = len(summary.layers), sum(each.elements for each in summary.layers)
    parts = [
        "\n".join(f"{key}: {value}" for key, value in details.items()),
        table(layers),
        *([table(values)] if summary.values else []),
        f"{counted(count, 'layer')}, {total:,} elements; {sum(summary.values.values()):,} trained in full",
    ]
    return "\n\n".join(parts)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
