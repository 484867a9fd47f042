"""The command: see the docstring of the package."""

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.growth import draw
from benchmarks.speed.measure import input_bytes, kept_bytes, ratio, seconds
from benchmarks.speed.others import rows
from benchmarks.speed.variants import build, installed
from lora_plugins.kernels import disabled_kernels

MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and draws the figure."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with disabled_kernels(*(["onednn"] if options.without_onednn else [])):
        _measure(options, torch.device(options.device))
    return 0


def _measure(options: argparse.Namespace, device: torch.device) -> None:
    table = Table("model", "dropout", "variant", "time / floor", "step (ms)", "kept (MiB)", "kept / full")
    for name in options.case:
        for dropout in options.dropout:
            for row in _rows(CASES[name], dropout, options.variant or installed(), options.rounds, device):
                table.add_row(*row)
            table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.others:
        others = Table("what", "ours", "peft")
        for row in rows(options.rounds, device):
            others.add_row(*row)
        Console().print(others)
    if options.growth:
        draw(options.growth, options.rounds, device)


def _rows(case: Case, dropout: float, names: list[str], rounds: int, device: torch.device) -> Iterator[list[str]]:
    batch = tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in case.batch())
    models = {name: model for name in names if (model := build(name, case, dropout, device)) is not None}
    times = seconds(models, batch, rounds)
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    for name in names:
        if name not in models:
            yield [case.name, f"{dropout:g}", name, "refuses", "", "", ""]
            continue
        share = f"{kept[name] / kept['full']:.2f}" if kept.get("full") else ""
        yield [
            case.name,
            f"{dropout:g}",
            name,
            f"{ratio(times, name):.2f}",
            f"{1000 * median(times[name]):.0f}",
            f"{kept[name] / MIB:.1f}",
            share,
        ]
    if "floor" in models:
        inputs = input_bytes(models["floor"], case.target_names(models["floor"]), batch)
        yield [case.name, f"{dropout:g}", "(floor + inputs)", "", "", f"{(kept['floor'] + inputs) / MIB:.1f}", ""]
    del models
    gc.collect()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="What a training step costs.")
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES), help="which models")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1], help="dropout of the adapter")
    parser.add_argument("--variant", nargs="+", choices=installed(), help="which variants; by default all of them")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--without-onednn", action="store_true", help="products of adapted layers by MKL, as those of the others"
    )
    parser.add_argument("--others", action="store_true", help="also injection, merging, inference and mixed batches")
    parser.add_argument("--growth", type=Path, help="also draw how the cost grows with rank, batch and depth")
    return parser


if __name__ == "__main__":
    sys.exit(main())
