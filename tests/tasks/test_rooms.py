"""The rooms of the tasks: which may import which, and only through their doors."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_plugins.tasks
from tests.core.processes import run_python

PACKAGE = "lora_plugins.tasks"
ROOT = Path(lora_plugins.tasks.__file__).parent
MAY_IMPORT = {
    "command_lines": {"errors", "file_kinds"},
    "argument_checks": set(),
    "errors": set(),
    "file_kinds": set(),
    "hub": set(),
    "files": {"errors"},
    "pages": {"errors"},
    "autoconfig": {"classification", "data", "errors", "file_kinds", "files", "hub", "models", "segmentation"},
    "command_table": {"autoconfig", "command_lines", "diffusion", "files", "inference", "pages", "serving"},
    "data": {"argument_checks", "errors", "files"},
    "models": {"argument_checks", "errors", "hub"},
    "training": {"argument_checks", "command_lines", "data", "errors", "files", "models"},
    "classification": {"argument_checks", "data", "errors", "files", "models", "training"},
    "segmentation": {"argument_checks", "data", "errors", "files", "models", "training"},
    "reporting": {"argument_checks", "data", "errors", "pages", "segmentation", "training"},
    "inference": {
        *("argument_checks", "command_lines", "data", "errors", "file_kinds", "files"),
        *("models", "segmentation", "training"),
    },
    "serving": {"command_lines", "errors", "files", "inference", "segmentation", "training"},
    "diffusion": {"argument_checks", "command_lines", "data", "errors", "files", "pages", "training"},
    "examples": {
        "argument_checks",
        "classification",
        "data",
        "diffusion",
        "errors",
        "files",
        "models",
        "segmentation",
        "training",
    },
}
"""The arrows: by room, the rooms that it may import. A room is a folder, or one of the files in `SINGLE`."""

SINGLE = ("argument_checks", "errors", "file_kinds", "hub", "command_lines", "command_table")
"""The rooms that are files."""

FILES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*/*.py"), *(ROOT / f"{name}.py" for name in SINGLE)])


def imported(path):
    """The modules of the tasks that a file imports, for types alone or inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(PACKAGE))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module.startswith(PACKAGE):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from [name if is_module(name) else node.module for name in inner]


def is_module(name):
    parts = name.removeprefix(f"{PACKAGE}.").split(".")
    return ROOT.joinpath(*parts).with_suffix(".py").is_file()


def room_of(path):
    return path.parts[0].removesuffix(".py")


def test_every_folder_and_file_is_known():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == set(MAY_IMPORT)


def test_the_arrows_have_no_circle():
    assert [*TopologicalSorter(MAY_IMPORT).static_order()]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_other_rooms_are_imported_as_the_arrows_say_and_through_their_doors(path):
    for name in imported(path):
        room, *inside = name.removeprefix(f"{PACKAGE}.").split(".")
        if room != room_of(path):
            assert room in MAY_IMPORT[room_of(path)], f"{path} imports {name}"
            assert not inside, f"{path} imports {name}, past the door of {room}"
        else:
            assert inside or path.stem in SINGLE, f"{path} imports its own door"


def test_a_file_name_means_one_thing():
    """Names that occur in two rooms: the same thing for labels and for masks."""
    names = [path.name for path in FILES if path.name != "__init__.py"]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"from_folder.py", "from_hub.py", "from_list.py", "metrics.py", "task.py"}
    for name in twice:
        assert {room_of(path) for path in FILES if path.name == name} == {"classification", "segmentation"}


@pytest.mark.parametrize("room", [room for room in MAY_IMPORT if room not in SINGLE])
def test_a_door_says_what_the_room_is_for_and_names_what_it_gives(room):
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    assert len(ast.get_docstring(tree).splitlines()) == 3
    (names,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    given = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(names) == sorted(given)
    assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (PACKAGE, {"lightning", "torchvision", "timm", "PIL"}),
        (f"{PACKAGE}.command_table", {"lightning", "torchvision", "timm", "PIL"}),
        (f"{PACKAGE}.autoconfig", {"lightning", "torchvision", "timm"}),  # which looks at images
    ],
    ids=["the package", "its commands", "what looks at data"],
)
def test_importing_it_is_cheap(module, heavy):
    run = run_python("-P", "-c", f"import sys, {module}; print({heavy!r} & {{*sys.modules}})")
    assert (run.stdout.strip(), run.returncode) == ("set()", 0), run.stderr


def test_every_public_name_is_there_and_sorted():
    assert lora_plugins.tasks.__all__ == sorted(lora_plugins.tasks.__all__)
    assert [name for name in lora_plugins.tasks.__all__ if not hasattr(lora_plugins.tasks, name)] == []


KINDS = {
    "autoconfig/arguments.py": "what the flag takes",
    "autoconfig/configuration.py": "which kinds Lightning finds, and which of them computes in bfloat16",
    "autoconfig/step_memory.py": "how much memory is free",
    "data/vision_module.py": "memory that is pinned",
    "reporting/html_report.py": "the peak of its memory",
    "reporting/run_facts.py": "its name",
}
"""Where kinds of accelerators differ; all else takes any of them, by `lora_plugins.devices`."""


def test_one_kind_of_accelerator_is_asked_for_where_kinds_differ():
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Constant) and node.value in ("cuda", "mps", "xpu")
            asked = isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.cuda.", "torch.mps."))
            if named or asked:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == KINDS.keys()
