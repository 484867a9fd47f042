"""Lists of samples: CSV files and JSON lines, one sample a row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_plugins.tasks.data.vision_module import TEST, TRAIN, VAL
from lora_plugins.tasks.errors import DataError, unknown

Row = Mapping[str, Any]
SPLITS = MappingProxyType({TRAIN: TRAIN, VAL: VAL, "valid": VAL, "validation": VAL, TEST: TEST})


def _csv_rows(text: str, path: Path) -> list[Row]:
    return list(csv.DictReader(text.splitlines()))


def _json_rows(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"Line {number} of {path} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"Line {number} of {path} is no JSON object.")
        rows.append(row)
    return rows


READERS: Mapping[str, Callable[[str, Path], list[Row]]] = MappingProxyType(
    {".csv": _csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows}
)


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV or JSON lines file, each with all the columns that are needed.

    Raises:
        DataError: Where the file is missing, of another kind, empty, or a row lacks a column.
    """
    if path.suffix not in READERS:
        raise DataError(f"{path} ends in {path.suffix!r}; a list of samples ends in {', '.join(READERS)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = READERS[path.suffix](text, path)
    if not rows:
        raise DataError(f"{path} holds no row.")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) in (None, ""):
                raise DataError(f"Row {number} of {path}: {unknown('column', column, row)}")
    return rows


def split_of(row: Row, column: str, where: str) -> str:
    """The split that a row belongs to: what its column says, or train where the rows have no such column.

    Raises:
        DataError: For another word than train, val, valid, validation and test.
    """
    name = row.get(column)
    if name in (None, ""):
        return TRAIN
    if name not in SPLITS:
        raise DataError(f"{where}: {unknown('split', str(name), SPLITS)}")
    return SPLITS[str(name)]
