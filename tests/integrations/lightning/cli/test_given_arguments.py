"""What is read of the files and flags of a command, before the parser sees them."""

import pytest

from lora_plugins.integrations.lightning.cli.given_arguments import read_arguments

TABLES = {
    "a key of its own in a table that is taken over": (
        "model: {a: {b: {c: &c {<<: &d {x: 1}, x: 1}}}, e: {<<: *c, z: 3}}",
        {"a": {"b": {"c": {"x": 1}}}, "e": {"x": 1, "z": 3}},
    ),
    "two tables that are taken over": (
        "model: {a: &a {x: 1}, b: &b {y: 2}, c: {<<: *a, <<: *b}}",
        {"a": {"x": 1}, "b": {"y": 2}, "c": {"x": 1, "y": 2}},
    ),
    "a number and a text": ("model: {a: {1: x, '1': y}}", {"a": {1: "x", "1": "y"}}),
}


@pytest.mark.parametrize(("text", "model"), TABLES.values(), ids=TABLES)
def test_tables_that_only_seem_to_have_a_key_twice(text, model, tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    assert read_arguments(["--config", str(path)], [], "fit")["model"] == model


def test_a_file_whose_name_has_two_lines(tmp_path):
    """As in a folder that is named after data; other values with an end of a line are the text of a configuration."""
    path = tmp_path / "two\nlines.yaml"
    path.write_text("lora: {r: 2}")
    assert read_arguments(["--config", str(path)], [], "fit") == {"lora": {"r": 2}}
    assert read_arguments(["--config", "lora:\n  r: 3"], [], "fit") == {"lora": {"r": 3}}
