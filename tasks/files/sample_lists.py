"""Lists of samples: CSV files and JSON lines, one sample per row."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_plugins.errors import listing, near, nothing_there
from lora_plugins.field_checks import shown
from lora_plugins.tasks.errors import DataError, unknown
from lora_plugins.tasks.files.splits import TEST, TRAIN, VAL

Row = Mapping[str, Any]
SPLIT_NAMES: Mapping[str, str] = {TRAIN: TRAIN, VAL: VAL, "valid": VAL, "validation": VAL, TEST: TEST}

SPLIT_COLUMN = "split"
"""The column that says which split a row is of, unless another one is named."""

_NO_COMMAS = ";\t|"
"""What else separates columns, as in what spreadsheets save where the comma is that of numbers."""


def _csv_rows(text: str, path: Path) -> list[Row]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        rows, names = list(reader), [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}") from error
    if len(names) == 1 and (other := next((sign for sign in _NO_COMMAS if sign in names[0]), None)):
        raise DataError(f"The columns of {path} are separated by {other!r}, not by commas: {names[0]!r}. Write commas.")
    twice = sorted({name for name in names if name and names.count(name) > 1})  # spreadsheets end lines in commas
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} more than once. Give each column a name of its own.")
    for number, row in enumerate(rows, 1):
        if None in row:  # where DictReader puts what is beyond the header
            raise DataError(f"Row {number} of {path} has more values than columns. Quote a value with a comma in it.")
    return [{key.strip(): value and value.strip() for key, value in row.items()} for row in rows]


def _json_rows(text: str, path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold what else `splitlines` takes for an end
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


READERS: Mapping[str, Callable[[str, Path], list[Row]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
}


ANNOTATIONS = frozenset({".json", ".xml"})
"""Endings of files of boxes and polygons, as programs write them in which people draw these."""

DRAWN_FIRST = "boxes and polygons (YOLO, COCO) have to be drawn as masks first"


def read_list(path: Path, columns: Sequence[str], split_column: str = SPLIT_COLUMN) -> list[Row]:
    """Reads the rows of a CSV or JSON lines file, and checks that each has the required columns.

    The usual column of splits may lack; if another one is named, one row at least has it.

    Raises:
        DataError: If the file is missing, of another kind or empty, if a row lacks a column, or holds something other
            than a text or a whole number there.
    """
    if path.suffix not in READERS:
        hint = f"; {DRAWN_FIRST}" if path.suffix.lower() in ANNOTATIONS else ""
        raise DataError(f"{path} ends in {path.suffix!r}; a list of samples ends in {', '.join(READERS)}{hint}.")
    rows = READERS[path.suffix](read_text(path), path)
    if not rows:
        raise DataError(f"{path} holds no row.")
    absent = next((column for column in columns if not any(column in row for row in rows)), None)
    if absent is not None:
        raise DataError(
            f"{path} has no column {absent!r}. It has {listing(rows[0])}, of which the one that is meant has to be "
            f"called {absent!r}{', in the first line' if path.suffix == '.csv' else ''}."
        )
    for number, row in enumerate(rows, 1):
        for column in columns:
            if column in row and row[column] in (None, ""):
                raise DataError(f"Row {number} of {path} has no value in the column {column!r}.")
            if column not in row:
                raise DataError(f"Row {number} of {path} has no column {column!r}. {near(column, row)}")
            if not isinstance(row[column], str | int) or isinstance(row[column], bool):  # as JSON can have it
                raise DataError(
                    f"Row {number} of {path} has {shown(row[column])} in the column {column!r}, where a text or a "
                    "whole number is expected."
                )
    if split_column != SPLIT_COLUMN and not any(split_column in row for row in rows):
        given = f"{split_column!r}, which is named as its split_column"
        raise DataError(f"{path} has no column {given}. {near(split_column, rows[0])}")
    return rows


def read_text(path: Path) -> str:
    """Reads a text in UTF-8, with or without a byte order mark.

    Raises:
        DataError: If it is missing, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}: {nothing_there(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. It has to be a text in UTF-8.") from error


def row_split(row: Row, column: str, where: str) -> str:
    """The split of a row: the value of its split column, or train if there is none.

    Raises:
        DataError: For another value than train, val, valid, validation and test.
    """
    name = row.get(column)
    if name in (None, ""):
        return TRAIN
    if str(name) not in SPLIT_NAMES:
        raise DataError(f"{where}: {unknown('split', str(name), SPLIT_NAMES)}")
    return SPLIT_NAMES[str(name)]


def path_key(value: object, root: Path) -> str:
    """The name of a listed file within its data, by which splits are made: its path as it is listed.

    An absolute path counts from the folder of the list, so that both can be moved together.
    """
    path = Path(str(value))
    if path.is_absolute():
        with suppress(ValueError):  # on another drive of Windows
            path = Path(os.path.relpath(path, root))
    return path.as_posix()
