"""Prints the plan, and the paths of the files that a run has written."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_plugins import Plan
from lora_plugins.errors import listing


def print_plan(plan: Plan, title: str = "LoRA", forgotten: Sequence[str] = ()) -> None:
    """Prints what is adapted: layer, plugin, rank, parameters and their share of the layer's own weight.

    Args:
        plan: The plan.
        title: The title of the table.
        forgotten: Names of layers that look new and are not trained.
    """
    table = Table(title=title)
    table.add_column("layer", overflow="fold")
    table.add_column("plugin")
    for column in ("rank", "parameters", "of its weight"):
        table.add_column(column, justify="right")
    for row, layer in zip(plan.rows(), plan.layers, strict=True):
        weight = sum(rows * columns for rows, columns in layer.shapes)
        name, _, plugin, rank, _, parameters = row
        table.add_row(name, plugin, rank, parameters, f"{layer.parameters / weight:.1%}")
    console = Console()
    console.print(table)
    if plan.trained:
        console.print(f"Trained in place: {listing(plan.trained)}", markup=False, highlight=False)
    if forgotten:
        console.print(f"Looks new, and is not trained: {listing(forgotten)}", markup=False, highlight=False)
    for each in plan.left_out:
        console.print(str(each), markup=False, highlight=False)
    console.print(plan.summary(), markup=False, highlight=False)


def print_lines(lines: Sequence[str]) -> None:
    """Prints lines that can be pasted: they are never wrapped."""
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_files(files: dict[str, Path]) -> None:
    """Prints the paths of files, one a line; they are never wrapped, so that they can be copied."""
    console = Console()
    for what, path in files.items():
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)
