"""Every kind of plugins has a kit, a hook that the docs show, and a section in the docs for authors."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError
from lora_plugins.formats.peft import PeftFormat
from lora_plugins.inits.gaussian import GaussianInit
from lora_plugins.layers.linear import LinearPlugin
from lora_plugins.plugins import KINDS
from lora_plugins.storages.int8 import Int8Storage
from lora_plugins.testing import (
    KITS,
    check_format_plugin,
    check_init_plugin,
    check_layer_plugin,
    check_storage_plugin,
)

DOCS = Path(__file__).parents[3] / "docs"


def linear(**options):
    return nn.Linear(4, 3, **options)


def input_of(layer):
    return torch.randn(2, 4)


def test_there_is_a_kit_for_each_kind():
    assert [kit.kind for kit in KITS] == [*KINDS]
    assert [kit.fixture for kit in KITS] == [
        "layer_check",
        "init_check",
        "variant_check",
        "format_check",
        "storage_check",
    ]


@pytest.mark.parametrize(
    ("check", "given", "said"),
    [
        (lambda options: check_layer_plugin(LinearPlugin(), linear, input_of, options), {"bias": False}, "lists those"),
        (lambda options: check_init_plugin(GaussianInit(), options), {"std": 0.1}, "lists those of one run after"),
        (lambda options: check_storage_plugin(Int8Storage(), options=options), [{}], "maps names to values"),
        (lambda options: check_format_plugin(PeftFormat(), options=options), [{}], "maps names to values"),
    ],
    ids=["layer", "init", "storage", "format"],
)
def test_options_of_another_form_are_told(check, given, said):
    with pytest.raises(ConfigError, match=f"options {said}"):
        check(given)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_docs_show_its_hook(kind):
    assert f"## {kind.hook_name}(registrar)" in (DOCS / "hooks.md").read_text()


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.kind.name)
def test_the_docs_name_what_checks_it(kit):
    pages = "".join(path.read_text() for path in DOCS.rglob("*.md"))
    assert kit.check.__name__ in pages
    assert kit.fixture in pages
