"""The layout is the map: which room may import which, read from the sources, imports for types included.

Integrations and tasks are rooms that no line of the table names, so no file of the core may import them.
"""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"lora_plugins": "lora_plugins", "integrations": "lora_plugins.integrations", "tasks": "lora_plugins.tasks"}
"""Folders of the repository, and the packages that they are installed as."""

BASIS = {"errors", "lazy", "names", "utils"}
ARROWS = {
    "errors": set(),
    "lazy": set(),
    "names": set(),
    "utils": set(),
    "devices": {"errors"},
    "writable": {"errors"},
    "words": {"errors"},
    "field_checks": {"errors"},
    "config": {"field_checks", "words", "errors"},
    "arguments": {"field_checks", "config", "words", "errors"},
    "kernels": BASIS,
    "plugins": {"arguments", "config", "field_checks", "words", *BASIS},
    "inplace": {"plugins", *BASIS},
    "plan": {"inplace", "plugins", "config", "field_checks", *BASIS},
    "adapter": {"plan", "inplace", "plugins", "arguments", "config", "field_checks", *BASIS},
    "merge": {"adapter", "plan", "inplace", "plugins", "kernels", *BASIS},
    "files": {"adapter", "plan", "inplace", "plugins", "arguments", "config", "field_checks", "writable", *BASIS},
    "hub": {"plugins", *BASIS},
    "model": {
        "arguments",
        "words",
        "writable",
        "hub",
        "files",
        "merge",
        "adapter",
        "plan",
        "plugins",
        "config",
        *BASIS,
    },
    "": {"model", "words", "hub", "files", "merge", "adapter", "plan", "plugins", "config", *BASIS},
    "layers": {"kernels", "plugins", *BASIS},
    "inits": {"plugins", "field_checks", *BASIS},
    "variants": {"plugins", *BASIS},
    "storages": {"plugins", "field_checks", *BASIS},
    "formats": {"files", "adapter", "plan", "inplace", "plugins", "config", "field_checks", "writable", *BASIS},
    "testing": {"model", "adapter", "inplace", "plugins", "config", "devices", *BASIS},
    "cli": {"", "formats", "hub", "files", "plugins", "kernels", "devices", "writable", *BASIS},
    "__main__": {"cli"},
}
"""By room of the core, the rooms that it may import. The empty name is the package's own door, `lora_plugins`."""


def modules():
    """The file of each module, by the name that it is installed under."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()
CORE = {name: path for name, path in MODULES.items() if not name.startswith(tuple([*FOLDERS.values()][1:]))}


def imports(path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            door = exported(node.module)
            for alias in node.names:
                file = f"{node.module}.{alias.name}"
                yield file if file in MODULES and alias.name not in door else node.module


@functools.cache
def exported(package):
    """The `__all__` of a package; a name there is the door's, also where a file has the same one."""
    assigned = [node for node in ast.parse(MODULES[package].read_text()).body if isinstance(node, ast.Assign)]
    return {
        name for node in assigned if ast.unparse(node.targets[0]) == "__all__" for name in ast.literal_eval(node.value)
    }


def room_of(module):
    """The room of a module of the core: the first name after `lora_plugins`."""
    return module.removeprefix("lora_plugins").lstrip(".").partition(".")[0]


def test_every_room_is_in_the_table():
    assert {room_of(name) for name in CORE} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_rooms_below_it(room):
    wrong = [
        f"{name} imports {imported}"
        for name, path in CORE.items()
        if room_of(name) == room
        for imported in imports(path)
        if room_of(imported) not in {room, *ARROWS[room]}
    ]
    assert wrong == []


def test_the_table_has_no_circle():
    assert [*TopologicalSorter(ARROWS).static_order()]


def test_no_file_imports_itself_in_a_circle():
    assert [*TopologicalSorter({name: {*imports(path)} - {name} for name, path in MODULES.items()}).static_order()]


def test_a_room_is_entered_by_its_door():
    """Others import `lora_plugins.ROOM`, never a file in it."""
    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        for imported in imports(path)
        if not name.endswith("__main__")  # which runs a program
        if imported in CORE and imported.count(".") > 1 and room_of(imported) != room_of(name)
    ]
    assert wrong == []


def test_no_file_name_has_two_meanings():
    """Within the core a name stands for one thing, wherever it occurs."""
    names = [name.rpartition(".")[2] for name, path in CORE.items() if path.name != "__init__.py"]
    layers_and_kernels = {"linear", "conv"}  # a layer type, and what computes it
    assert {name for name in names if names.count(name) > 1} <= layers_and_kernels
