"""The command: see the docstring of the package."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.scale.adapters import rows
from benchmarks.scale.growth import LAYERS, over_layers, over_memory

Costs = Mapping[int, Mapping[str, float]]


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="How costs grow.")
    parser.add_argument("--layers", nargs="*", type=int, default=list(LAYERS), help="numbers of layers")
    parser.add_argument("--sizes", nargs="*", type=int, default=[], help="megabytes of models")
    parser.add_argument("--adapters", action="store_true", help="also many adapters on one model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measured: dict[str, Costs] = {}
    if options.layers:
        measured["layers"] = dict(over_layers(options.layers))
    if options.sizes:
        measured["megabytes"] = dict(over_memory(options.sizes))
    for what, costs in measured.items():
        _print(what, costs)
    if options.figure:
        draw(options.figure, measured)
    if options.adapters:
        table = Table("what", "ours", "peft")
        for row in rows(options.rounds):
            table.add_row(*row)
        Console(width=120).print(table)
    return 0


def _print(what: str, costs: Costs) -> None:
    table = Table("seconds", *(f"{size:,} {what}" for size in costs))
    for name in next(iter(costs.values())):
        table.add_row(name, *(f"{of[name]:.3f}" for of in costs.values()))
    Console(width=120).print(table)


def draw(path: Path, measured: Mapping[str, Costs]) -> None:
    """Draws seconds over sizes, both by powers of ten: what is linear is parallel to the grey lines."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(measured), figsize=(5 * len(measured), 3.5), layout="constrained", squeeze=False
    )
    for panel, (what, costs) in zip(panels[0], measured.items(), strict=True):
        sizes = list(costs)
        for name in costs[sizes[0]]:
            panel.plot(sizes, [costs[size][name] for size in sizes], marker="o", markersize=3, label=name)
        for seconds in (1e-5, 1e-4, 1e-3):
            panel.plot(sizes, [seconds * size for size in sizes], color="lightgray", linewidth=0.8, zorder=0)
        panel.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
