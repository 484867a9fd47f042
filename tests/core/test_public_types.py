"""Whatever a public signature names can be imported from where the signature is."""

import dataclasses
import importlib
import inspect
import pkgutil
import typing

import pytest

import lora_plugins

PUBLIC = {name: getattr(lora_plugins, name) for name in lora_plugins.__all__}
CLASSES = {value for value in PUBLIC.values() if isinstance(value, type)}


def annotated(value):
    """The public functions of a public name: itself, or the public methods of a class."""
    if inspect.isfunction(value):
        yield value
    elif isinstance(value, type):
        for name, member in inspect.getmembers(value):
            function = inspect.unwrap(member.fget) if isinstance(member, property) else inspect.unwrap(member)
            if inspect.isfunction(function) and (not name.startswith("_") or name == "__init__"):
                yield function


def parts(annotation):
    """An annotation and all that it is made of."""
    yield annotation
    origin = typing.get_origin(annotation)
    if origin is not None:
        yield origin
        for argument in typing.get_args(annotation):
            yield from parts(argument)


def foreign_to_users(function):
    """Classes of ours in a signature that are not public."""
    hints = typing.get_type_hints(function)
    found = {part for hint in hints.values() for part in parts(hint) if isinstance(part, type)}
    return {cls.__name__ for cls in found if cls.__module__.startswith("lora_plugins") and cls not in CLASSES}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_type_of_a_public_signature_is_public(name):
    assert {function.__qualname__: foreign_to_users(function) for function in annotated(PUBLIC[name])} == {
        function.__qualname__: set() for function in annotated(PUBLIC[name])
    }


@pytest.mark.parametrize("name", [name for name in PUBLIC if dataclasses.is_dataclass(PUBLIC[name])])
def test_every_public_dataclass_is_frozen(name):
    assert PUBLIC[name].__dataclass_params__.frozen


STATES = {"LayerState", "ModelState", "OwnedTensors", "_Sums"}
"""What is written into, and therefore not frozen."""


def test_what_is_passed_on_is_frozen():
    names = [module.name for module in pkgutil.walk_packages(lora_plugins.__path__, "lora_plugins.")]
    inner = [name for name in names if name.split(".")[1] not in ("integrations", "tasks", "__main__")]
    modules = [importlib.import_module(name) for name in inner]
    classes = {cls for module in modules for cls in vars(module).values() if isinstance(cls, type)}
    ours = {cls for cls in classes if dataclasses.is_dataclass(cls) and cls.__module__ in inner}
    assert len(ours) > len(STATES)
    assert {cls.__name__ for cls in ours if not cls.__dataclass_params__.frozen} == STATES
