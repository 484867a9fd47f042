"""The command: see the docstring of the package."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed import growth
from benchmarks.speed.cases import CASES
from benchmarks.speed.cells import MODES, Cell, cells
from benchmarks.speed.draw import as_text
from benchmarks.speed.machine import machine
from benchmarks.speed.measure import input_bytes, kept_bytes, ratios, seconds, step
from benchmarks.speed.memory import allocator_peak, process_peak
from benchmarks.speed.others import rows
from benchmarks.speed.precision import PRECISIONS
from benchmarks.speed.variants import TABLE, build, installed
from lora_plugins.kernels import disabled_kernels

MIB = 2**20
Measured = dict[str, dict[str, float | None]]


def main(arguments: list[str] | None = None) -> int:
    """Measures the cells that are not in the file yet, writes each to the file, and prints them all."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    found = _read(options.json, machine(device))
    with disabled_kernels(*(["onednn"] if options.without_onednn else [])):
        for cell in cells(options):
            known = {} if options.again else found["cells"].get(cell.key, {})
            missing = [name for name in options.variant if name not in known]
            if missing:  # all of them, since ratios are of one run
                found["cells"][cell.key] = {**known, **_measure(cell, options, device)}
                _write(options.json, found)
        print(as_text(found))
        if options.others:
            others = Table("what", "ours", "peft")
            for row in rows(options.rounds, device):
                others.add_row(*row)
            Console().print(others)
        if options.growth:
            growth.draw(options.growth, options.rounds, device)
    return 0


def _measure(cell: Cell, options: argparse.Namespace, device: torch.device) -> Measured:
    """Measures the variants of one cell, the floor among them."""
    precision, case = PRECISIONS[cell.precision], cell.model
    batch = tuple(
        x.detach().to(device, precision.weights if x.is_floating_point() else None).requires_grad_(x.requires_grad)
        for x in case.batch()
    )
    names = list(dict.fromkeys(["floor", *options.variant]))
    models = {name: model for name in names if (model := build(name, case, cell.dropout, device)) is not None}
    if precision.weights != torch.float32:  # adapters stay in float32, as both libraries have them
        for model in models.values():
            _cast_base(model, precision.weights)
    found: Measured = {name: {"ratio": None} for name in names}
    with precision.context(device):
        for name, model in models.items():
            found[name]["kept"] = kept_bytes(model, batch) / MIB
        inputs = input_bytes(models["floor"], case.target_names(models["floor"]), batch) / MIB
    found["floor"]["with inputs"] = (found["floor"]["kept"] or 0) + inputs
    steps = models
    if cell.mode == "compiled":
        torch._dynamo.reset()
        steps = {name: torch.compile(model, dynamic=False) for name, model in models.items()}  # type: ignore[misc]
    times = seconds(steps, batch, options.rounds, precision)
    for name, plain in models.items():
        each = ratios(times, name)
        low, _, high = quantiles(each, n=4, method="inclusive")
        found[name] |= {"ratio": median(each), "low": low, "high": high, "ms": 1000 * median(times[name])}
        model, leaves = steps[name], [*plain.parameters(), *batch]

        def run(model: Any = model, leaves: Any = leaves) -> None:
            step(model, batch, leaves, precision)

        found[name]["allocator"] = allocator_peak(run, device) / MIB
        peak = process_peak(run)
        found[name]["process"] = None if peak is None else peak / MIB
    del models, steps
    gc.collect()
    return found


def _cast_base(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts all tensors but those of adapters."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _read(path: Path | None, here: Mapping[str, object]) -> dict[str, Any]:
    if path is None or not path.exists():
        return {"machine": dict(here), "cells": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    if found["machine"] != here:
        raise SystemExit(f"{path} was measured on {found['machine']}, and this is {dict(here)}: use another file.")
    return found


def _write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1))
        os.replace(unfinished, path)


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is no number of rounds, which is 2 at least")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="What a training step costs.")
    parser.add_argument("--json", type=Path, help="file of the results; cells that it has are not measured again")
    parser.add_argument("--again", action="store_true", help="measure them again")
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES), help="which models")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1], help="dropout of the adapter")
    parser.add_argument("--checkpointing", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    table = [name for name in TABLE if name in installed()]
    parser.add_argument("--variant", nargs="+", choices=installed(), default=table, help="which variants")
    parser.add_argument("--rounds", type=_rounds, default=15, help="steps of each variant")
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
