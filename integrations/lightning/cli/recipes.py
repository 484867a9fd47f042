"""The YAML files that are shipped: `lora-plugins recipes`, and `--config recipe:seg`."""

import shutil
import textwrap
from importlib import metadata
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

from lora_plugins import ConfigError
from lora_plugins.cli import Parser
from lora_plugins.errors import near
from lora_plugins.writable import check_writable_file

GROUP = "lora_plugins.recipes"
"""Entry-point group for packages whose YAML files are recipes."""

PREFIX = "recipe:"
"""What a configuration begins with that is the name of a recipe."""


def recipes() -> dict[str, Path]:
    """Returns the paths of the YAML files of all packages that ship some, by name."""
    folders = [Path(str(files(point.value))) for point in metadata.entry_points(group=GROUP)]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """Returns the path of a recipe.

    Raises:
        ConfigError: If there is none of that name.
    """
    found = recipes()
    if name not in found:
        raise ConfigError(f"There is no recipe {name!r}. {near(name, found)}")
    return found[name]


def run(arguments: list[str]) -> int:
    """Runs the command `recipes`; returns the exit code."""
    parser = Parser(prog="lora-plugins recipes", description=__doc__)
    actions = parser.add_subparsers(dest="action", title="actions")
    actions.add_parser("list", help="their names, and what each is for (the default)")
    show = actions.add_parser("show", help="print one")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="write one to a file of your own")
    copy.add_argument("name")
    copy.add_argument("path", nargs="?", type=Path, help="by default NAME.yaml in this folder")
    given = parser.parse_args(arguments)
    if given.action == "show":
        print(recipe_path(given.name).read_text(encoding="utf-8"), end="")
    elif given.action == "copy":
        _copy(recipe_path(given.name), given.path or Path(f"{given.name}.yaml"))
    else:
        for name, path in recipes().items():
            print(_entry(name, path, shutil.get_terminal_size((100, 24)).columns))
        print("\nRun one: lora-plugins fit --config recipe:NAME    Copy one: lora-plugins recipes copy NAME")
    return 0


def _copy(recipe: Path, path: Path) -> None:
    from lora_plugins.utils import replace_file  # noqa: PLC0415 - brings torch along

    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already. Name another file.")
    check_writable_file(path, "The file")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, recipe.read_bytes())
    print(f"Written: {path}")


def _entry(name: str, path: Path, width: int) -> str:
    """The name of a recipe and what it is for, which is the first paragraph of its comment."""
    lines = takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    said = " ".join(line.removeprefix("# ") for line in lines).rstrip(".")
    return textwrap.fill(
        said, max(width, 60), initial_indent=f"  {name:22}", subsequent_indent=" " * 24, break_on_hyphens=False
    )
