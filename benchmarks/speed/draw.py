"""Draws what was measured, as tables in Markdown.

python -m benchmarks.speed.draw results.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Mapping[str, float | None]]

MEMORY = {"kept": "kept for the backward", "allocator": "peak of the allocator", "process": "growth of the process"}


def as_text(results: Mapping[str, Any]) -> str:
    """Returns the tables: times over the floor first, then memory."""
    here, cells = results["machine"], results["cells"]
    machine = f"{here['card'] or here['processor']}, {here['threads']} threads, torch {here['torch']}"
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    parts = [
        f"Time of a step over that of the floor: {machine}, PEFT {here['peft'] or 'not installed'}.",
        _table(cells, [name for name in names if name != "floor"], _time, "floor (ms)", _milliseconds),
    ]
    for key, title in MEMORY.items():
        parts += [f"MiB, {title}: {machine}.", _table(cells, names, lambda each, k=key: _number(each.get(k)))]
    return "\n\n".join(parts) + "\n"


def _table(
    cells: Mapping[str, Found],
    names: Sequence[str],
    of: Callable[[Mapping[str, float | None]], str],
    last: str = "",
    of_floor: Callable[[Mapping[str, float | None]], str] | None = None,
) -> str:
    rows = [["cell", *names, *([last] if last else [])]]
    for key, found in cells.items():
        end = [of_floor(found["floor"])] if of_floor else []
        rows.append([key, *(of(found[name]) if name in found else "" for name in names), *end])
    return "\n".join([_line(rows[0]), _line("---" for _ in rows[0]), *map(_line, rows[1:])])


def _line(row: Iterable[str]) -> str:
    return f"| {' | '.join(row)} |"


def _time(each: Mapping[str, float | None]) -> str:
    return "refuses" if each.get("ratio") is None else f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})"


def _milliseconds(each: Mapping[str, float | None]) -> str:
    return _number(each.get("ms"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables of some files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.draw", description="Draw what was measured.")
    parser.add_argument("files", nargs="+", type=Path, help="results of python -m benchmarks.speed --json")
    for path in parser.parse_args(arguments).files:
        if not path.is_file():
            parser.error(f"there is no file {path}")
        results = json.loads(path.read_text())
        if not {"machine", "cells"} <= results.keys():
            parser.error(f"{path} was not written by python -m benchmarks.speed --json")
        print(as_text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
