"""The door itself: what a plugin can implement, and that our own plugins come in by it."""

import inspect
from importlib import metadata
from typing import get_origin

import pytest

from lora_plugins.inits import lora_plugins_register_inits
from lora_plugins.layers import lora_plugins_register_layers
from lora_plugins.plugins import KINDS, Registrar, hookspecs

SPECS = {name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.GROUP}_spec")}


def test_the_hooks():
    assert set(SPECS) == {kind.hook_name for kind in KINDS}
    assert [kind.name for kind in KINDS] == ["layers", "inits", "variants", "formats", "storages"]


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_hands_in_a_typed_registrar_and_takes_nothing_back(name):
    signature = inspect.signature(SPECS[name])
    assert list(signature.parameters) == ["registrar"]
    assert get_origin(signature.parameters["registrar"].annotation) is Registrar
    assert signature.return_annotation is None


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_says_when_it_is_called(name):
    assert "once" in inspect.getdoc(SPECS[name])


@pytest.mark.parametrize("function", [lora_plugins_register_layers, lora_plugins_register_inits])
def test_the_built_in_plugins_implement_the_hooks_by_the_public_marker(function):
    assert hasattr(function, f"{hookspecs.GROUP}_impl")
    assert function.__name__ in SPECS


def test_the_entry_points_of_this_distribution():
    points = {p.name: p.value for p in metadata.distribution("lora-plugins").entry_points if p.group == "lora_plugins"}
    assert points == {kind: f"lora_plugins.{kind}" for kind in ("layers", "inits", "variants", "formats", "storages")}
