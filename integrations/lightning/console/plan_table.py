"""Prints the plan of an adapter."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import get_console
from rich.console import Console
from rich.table import Table

from lora_plugins import Plan
from lora_plugins.errors import listing


def print_plan(plan: Plan, title: str, forgotten: Sequence[str] = ()) -> None:
    """Prints what is adapted: layer, plugin, rank, parameters and their share of the layer's own weight.

    Layers that differ in the number of their block share a row, such as `blocks.0-11.attn.qkv x12`. `forgotten` names
    layers that look new and are not trained.
    """
    table = Table(title=title)
    table.add_column("layer", overflow="fold")
    table.add_column("plugin")
    for column in ("rank", "parameters", "of its weight"):
        table.add_column(column, justify="right")
    for group in plan.groups():
        first = group.layers[0]
        plugin = first.plugin.name if first.variant is None else f"{first.plugin.name}, {first.variant.name}"
        name, parameters = _times(group.name, len(group.layers)), f"{group.parameters:,}"
        table.add_row(name, plugin, str(first.r), parameters, f"{group.share:.1%}")
    console = plain_console()
    console.print(table)
    trained = [_times(name, count) for name, count in plan.trained_groups().items()]
    more = [f"... ({len(trained) - _MOST} more)"] if len(trained) > _MOST else []
    notes = [
        *([f"Trained in place: {', '.join([*trained[:_MOST], *more])}"] if trained else []),
        *([f"Looks new, and is not trained: {listing(forgotten)}"] if forgotten else []),
        *plan.notes,
    ]
    for note in [*notes, plan.summary()]:
        console.print(note)


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines that can be pasted: they are never wrapped."""
    console = plain_console()
    for line in lines:
        console.print(line, soft_wrap=True)


def plain_console() -> Console:
    """Returns a console that prints text as it is, as names of classes and layers have to be: `[void]`, `:x:`."""
    return Console(markup=False, emoji=False, highlight=False)


@contextmanager
def plain_metrics() -> Iterator[None]:
    """Lets the tables that Lightning prints inside a `with` block have names of metrics as they are, too."""
    options = vars(get_console())  # of which rich's `reconfigure` would lose where it writes to, and how wide
    usual = {name: options[name] for name in ("_markup", "_emoji")}
    options.update(dict.fromkeys(usual, False))
    try:
        yield
    finally:
        options.update(usual)


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} x{count}"


_MOST = 8
"""Groups of tensors that are listed; further ones are counted."""
