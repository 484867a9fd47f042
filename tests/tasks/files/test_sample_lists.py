"""Lists of samples: what cannot be meant is refused, by row and column."""

import math
import re

import pytest

from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import read_list, row_split

from ..conftest import written


@pytest.mark.parametrize(
    "value", [["cat"], {"name": "cat"}, 1.0, math.nan, True], ids=["list", "table", "float", "nan", "flag"]
)
@pytest.mark.parametrize("column", ["image", "label"])
def test_values_that_are_no_text_are_refused(tmp_path, column, value):
    rows = [{"image": "a.jpg", "label": "cat"}, {"image": "b.jpg", "label": "dog"} | {column: value}]
    with pytest.raises(DataError, match=rf"Row 2 of .*in the column '{column}', where a text or a whole number"):
        read_list(tmp_path / written(tmp_path / "list.jsonl", rows), ("image", "label"))


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.json", "; boxes and polygons (YOLO, COCO) have to be drawn as masks first."), ("a.xlsx", ".ndjson.")],
    ids=["of a program that draws", "another"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, ending):
    with pytest.raises(DataError, match=rf"a list of samples ends in \.csv, .*{re.escape(ending)}$"):
        read_list(tmp_path / name, ("image", "label"))


def test_whole_numbers_are_texts_too(tmp_path):
    path = tmp_path / written(tmp_path / "list.jsonl", [{"image": 7, "label": 0}])
    assert read_list(path, ("image", "label")) == [{"image": 7, "label": 0}]


def test_columns_without_a_name_may_be_several(tmp_path):
    """As spreadsheets write them that had more columns once."""
    (tmp_path / "list.csv").write_text("image,label,,\na.jpg,cat,,\n")
    assert read_list(tmp_path / "list.csv", ("image", "label")) == [{"image": "a.jpg", "label": "cat", "": ""}]


@pytest.mark.parametrize("header", ["image,label,label", "image,label, label "], ids=["alike", "but for spaces"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, header):
    (tmp_path / "list.csv").write_text(f"{header}\na.jpg,cat,dog\n")
    with pytest.raises(DataError, match="has the column 'label' more than once"):
        read_list(tmp_path / "list.csv", ("image", "label"))


def test_a_name_of_several_may_have_such_a_sign(tmp_path):
    (tmp_path / "list.csv").write_text("image|path,label\na.jpg,cat\n")
    assert read_list(tmp_path / "list.csv", ("image|path", "label")) == [{"image|path": "a.jpg", "label": "cat"}]


@pytest.mark.parametrize("separator", [";", "\t"], ids=["semicolon", "tab"])
def test_columns_that_other_signs_separate_are_refused(tmp_path, separator):
    """As of spreadsheets of countries in which numbers have a comma; here names of files have one, too."""
    (tmp_path / "list.csv").write_text(f"image{separator}label\n1,5.jpg{separator}cat\n")
    with pytest.raises(DataError, match=re.escape(f"separated by {separator!r}, not by commas: 'image")):
        read_list(tmp_path / "list.csv", ("image", "label"))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("list.csv", "path,target\na.jpg,cat\n", ", in the first line"),
        ("list.jsonl", '{"path": "a.jpg", "target": 1}\n', ""),
    ],
    ids=["csv", "jsonl"],
)
def test_what_a_list_has_instead_of_a_column_is_said(tmp_path, name, content, where):
    """Nothing is near enough to be suggested: of these two, `target` is the nearer one to `image`."""
    (tmp_path / name).write_text(content)
    said = "has no column 'image'. It has 'path', 'target', of which the one that is meant has to be called 'image'"
    with pytest.raises(DataError, match=re.escape(f"{said}{where}.")):
        read_list(tmp_path / name, ("image", "target"))


def test_a_row_that_lacks_a_column_is_named(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "label": 1}\n{"image": "b.jpg", "lable": 1}\n')
    with pytest.raises(DataError, match=r"Row 2 of .*list\.jsonl has no column 'label'\. Did you mean 'lable'\?"):
        read_list(tmp_path / "list.jsonl", ("image", "label"))


def test_a_list_that_is_not_there(tmp_path):
    (tmp_path / "list.csv").touch()
    with pytest.raises(DataError, match=r"There is no file .*lits\.csv: .*\. Did you mean 'list\.csv'\?$"):
        read_list(tmp_path / "lits.csv", ("image",))


@pytest.mark.parametrize("split", [["train"], {}, 1, "Train"], ids=["list", "table", "number", "case"])
def test_splits_that_are_none_are_refused(split):
    with pytest.raises(DataError, match="Row 1: Unknown split"):
        row_split({"split": split}, "split", "Row 1")
