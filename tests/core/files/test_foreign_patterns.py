"""A file cannot stop a process by a regular expression."""

import re

import pytest
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraError, LoraModel
from lora_plugins.files import foreign_patterns
from tests.core.file_cases import manifest_of, write_manifest
from tests.slow import slow_but


def build():
    model = nn.ModuleDict({"a" * 40: nn.Linear(4, 4)})
    nn.init.ones_(model["a" * 40].weight)
    return model


def saved(folder, **changes):
    LoraModel(build(), LoraConfig(r=2, target_modules=["a" * 40])).save_adapter(folder)
    manifest = manifest_of(folder)
    manifest["config"].update(changes)
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    "changes",
    slow_but(
        [
            {"target_modules": "((a+)+)+b"},
            {"target_modules": "(a|a)*b"},
            {"exclude_modules": "(a*)*b"},
            {"rank_pattern": {"(a+)+b": 2}},
            {"target_modules": "a*" * 40 + "b"},
            {"target_modules": "a?" * 40 + "b"},
            {"target_modules": "(a|.)" * 30 + "b"},
        ],
        [{"exclude_modules": "(a*)*b"}, {"rank_pattern": {"(a+)+b": 2}}, {"target_modules": "a?" * 40 + "b"}],
    ),
    ids=str,
)
def test_one_that_takes_for_ever_is_refused(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_patterns, "_SECONDS", 1.0)
    saved(tmp_path, **changes)
    with pytest.raises(AdapterFileError, match="take more than 1 seconds"):
        LoraModel.load_adapter(build(), tmp_path)


@pytest.mark.parametrize("pattern", ["a+", r"(a|b)*a+(x?)*", "(?:a{2})+a*.*"])
def test_others_load(pattern, tmp_path):
    assert re.fullmatch(pattern, "a" * 40)
    saved(tmp_path, target_modules=pattern)
    LoraModel.load_adapter(build(), tmp_path)


def test_one_that_is_no_expression_is_told_as_ever(tmp_path, capfd):
    saved(tmp_path, target_modules="a+(a+)+(")
    with pytest.raises(LoraError, match="is not a regular expression"):
        LoraModel.load_adapter(build(), tmp_path)
    assert capfd.readouterr() == ("", "")  # the process that tries it says nothing of its own
