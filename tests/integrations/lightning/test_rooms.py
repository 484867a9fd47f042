"""The rooms of the integration, read from its source: who imports whom, and where private parts of Lightning are."""

import ast
import importlib
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import lightning.pytorch
import pytest

import lora_plugins
from lora_plugins.integrations import lightning as integration

NAME = "lora_plugins.integrations.lightning"
FOLDER = Path(integration.__file__).parent
CORE = Path(lora_plugins.__file__).parent
FILES = {str(path.relative_to(FOLDER)): ast.parse(path.read_text()) for path in sorted(FOLDER.rglob("*.py"))}

ARROWS = {
    "module": set(),
    "shims": set(),
    "console": {"shims"},
    "adapter_files": set(),
    "aliases": set(),
    "class_paths": set(),
    "checkpoint": {"aliases", "module"},
    "strategies": {"checkpoint", "module", "shims"},
    "training": {"module", "shims", "strategies"},
    "writer": {"shims"},
    "shared_options": set(),
    "results": {"adapter_files", "module", "shims", "strategies"},
    "run": {"module", "shims", "strategies", "training"},
    "sharded_run": {"module", "run", "shims", "strategies", "training"},
    "callback": {
        "adapter_files",
        "checkpoint",
        "class_paths",
        "console",
        "module",
        "results",
        "run",
        "shared_options",
        "sharded_run",
        "shims",
        "strategies",
        "training",
        "writer",
    },
    "cli": {"aliases", "callback", "checkpoint", "console", "module", "writer"},
    "__init__": {"adapter_files", "aliases", "callback", "checkpoint", "cli", "training"},  # its public names
    "__main__": set(),
}
"""Which room imports from which others."""

PRIVATE = {
    "_MultiProcessingLauncher": "shims/multiprocessing_launcher.py",
    "_add_configure_optimizers_method_to_model": "cli/optimizer_section.py",
    "_data_source": "shims/fit_data_source.py",
    "_parse_ckpt_path": "cli/checkpoint_arguments.py",
    "_state_dict_type": "shims/fsdp_state_dict.py",
}
"""Private parts of Lightning, and the one file that uses each."""

files = pytest.mark.parametrize("file", FILES)


def room_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def imports_of(file: str) -> list[str]:
    """The modules of the integration that a file imports, below `NAME`; imports for types included."""
    found = []
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{NAME}."):
            path = node.module.removeprefix(NAME).removeprefix(".")
            inner = [f"{path}.{alias.name}".strip(".").replace(".", "/") for alias in node.names]
            modules = [name for name in inner if f"{name}.py" in FILES or f"{name}/__init__.py" in FILES]
            found += [name.replace("/", ".") for name in modules] or [path]
    return found


@files
def test_a_file_imports_files_of_its_room_and_doors_of_others(file):
    room = room_of(file)
    for module in imports_of(file):
        assert module, "the package itself, which imports all rooms"
        assert module.startswith(f"{room}.") or "." not in module, f"past the door: {module}"
        assert module != room, "its own door"


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_are_those_of_the_table(room):
    found = {module.partition(".")[0] for file in FILES if room_of(file) == room for module in imports_of(file)}
    assert found - {room} == ARROWS[room]


def test_no_circle():
    assert {room_of(file) for file in FILES} == set(ARROWS)
    names = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in FILES}
    graph = {name: set(imports_of(file)) for name, file in names.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("module") < order.index("checkpoint") < order.index("callback") < order.index("cli")


def test_no_file_has_the_name_of_another():
    own = [Path(file).name for file in FILES if not Path(file).name.startswith("__")]
    others = {path.name for path in CORE.rglob("*.py") if FOLDER not in path.parents and "tasks" not in path.parts}
    assert len(own) == len(set(own))
    assert not set(own) & others


@pytest.mark.parametrize("room", sorted({room_of(file) for file in FILES if "/" in file}))
def test_a_door_hides_no_file_behind_a_name_and_exports_what_it_says(room):
    door = importlib.import_module(f"{NAME}.{room}")
    assert not set(door.__all__) & {Path(file).stem for file in FILES if room_of(file) == room}
    assert [name for name in door.__all__ if not hasattr(door, name)] == []


@pytest.fixture(scope="module")
def names_of_lightning():
    """Every name with one underscore that is in the source of Lightning."""
    sources = Path(lightning.pytorch.__file__).parent.rglob("*.py")
    return {name for path in sources for name in re.findall(r"\b_[A-Za-z]\w+", path.read_text())}


@files
def test_private_parts_of_lightning_are_used_where_the_table_says(file, names_of_lightning):
    nodes = list(ast.walk(FILES[file]))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    found = ((used - own) & names_of_lightning) | overridden(file)
    assert found == {name for name, place in PRIVATE.items() if place == file}


def overridden(file: str) -> set[str]:
    """Private names that classes of a file have, and that are those of a class of Lightning below them."""
    if file == "__main__.py":  # runs the program
        return set()
    module = importlib.import_module(f"{NAME}.{file.removesuffix('.py').replace('/', '.')}")
    own = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    bases = [(cls, base) for cls in own for base in cls.__mro__ if base.__module__.startswith("lightning.")]
    names = {name for cls, base in bases for name in vars(cls).keys() & vars(base).keys()}
    return {name for name in names if re.fullmatch(r"_[A-Za-z]\w+", name)} - {"_abc_impl"}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_parts_are_still_there(name, names_of_lightning):
    assert name in names_of_lightning
