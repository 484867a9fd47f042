"""Parts of paths, against lists of components."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_plugins.utils import path_ends, path_runs, path_starts, within

component = st.text(alphabet="ab1_/ é", min_size=1, max_size=3)
path = st.lists(component, min_size=1, max_size=5)


@given(path)
def test_starts_and_ends_of_a_name(parts):
    name = ".".join(parts)
    assert path_starts(name) == [".".join(parts[:stop]) for stop in range(len(parts), 0, -1)]
    assert path_ends(name) == [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def test_the_model_itself_has_no_start():
    assert path_starts("") == []
    assert path_ends("") == [""]


@given(path, path)
def test_runs_are_those_of_the_lists_of_components(wanted, parts):
    length = len(wanted)
    runs = [parts[at : at + length] for at in range(len(parts) - length + 1)]
    assert (".".join(wanted) in path_runs(".".join(parts))) == (wanted in runs)


@pytest.mark.parametrize(
    ("run", "name", "inside"),
    [
        ("attn", "blocks.0.attn.qkv", True),
        ("blocks.0", "blocks.0.attn.qkv", True),
        ("blocks.1", "blocks.10.attn.qkv", False),
        ("locks.0", "blocks.0.attn.qkv", False),
        ("a.blocks.0.attn.qkv", "blocks.0.attn.qkv", False),
    ],
)
def test_a_run_is_no_part_of_a_component(run, name, inside):
    assert (run in path_runs(name)) is inside


@pytest.mark.parametrize(
    ("name", "roots", "inside"),
    [
        ("blocks.0.attn", ["blocks.0"], True),
        ("blocks.0", ["blocks.0"], True),
        ("blocks.01", ["blocks.0"], False),
        ("blocks", ["blocks.0"], False),
        ("blocks.0", [""], True),
        ("", [""], True),
        ("", ["blocks"], False),
        ("blocks.0", [], False),
    ],
)
def test_what_lies_within(name, roots, inside):
    assert within(name, roots) is within(name, {*roots}) is inside
