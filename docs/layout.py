"""What mkdocs needs to know of this repository: where the package is, and what its public names are.

Run as a script, it copies the package into a folder as an installation has it, for other tools that read sources.
"""

import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent
FOLDERS = {"lora_plugins": ".", "integrations": "integrations", "tasks": "tasks"}
MARK = re.compile(r"^<!-- every public name of (\S+) -->$", re.MULTILINE)
README = re.compile(r"^<!-- the README up to (.+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!http|docs/)[^)]*\)")
"""A link of the README to what the site does not have."""


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: Any) -> Any:
    """Called by mkdocs; shows mkdocstrings the package."""
    folder = Path(tempfile.mkdtemp(prefix="lora-plugins-docs-"))
    copy_package(folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    config.extra["sources"] = str(folder)
    return config


def copy_package(folder: Path) -> None:
    """Copies the sources into a folder as they are installed, `integrations/` and `tasks/` inside the package."""
    for source, inside in FOLDERS.items():
        shutil.copytree(
            ROOT / source,
            folder / "lora_plugins" / inside,
            dirs_exist_ok=True,
            ignore=lambda _, names: [name for name in names if Path(name).suffix not in ("", ".py")],
        )


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Called by mkdocs for each page; puts what a page asks for where it does.

    That is an entry for each name of a module's `__all__`, and the beginning of the README, with the links of the site.
    """
    sources = Path(config.extra["sources"])

    def entries(match: re.Match[str]) -> str:
        module = match.group(1)
        return "\n\n".join(f"::: {module}.{name}" for name in public_names(sources, module))

    return README.sub(lambda match: readme(until=match.group(1)), MARK.sub(entries, markdown))


def readme(until: str) -> str:
    """Returns the README up to a heading, as a page of the site."""
    text, heading, _ = (ROOT / "README.md").read_text().partition(f"\n{until}\n")
    if not heading:
        raise ValueError(f"README.md has no line {until!r}.")
    return LINK.sub(r"\1", text).replace("](docs/", "](")


def on_post_build(config: Any) -> None:
    """Called by mkdocs; removes the copy."""
    shutil.rmtree(config.extra["sources"])


def public_names(sources: Path, module: str) -> list[str]:
    """Returns the `__all__` of a package, without importing it."""
    tree = ast.parse((sources.joinpath(*module.split(".")) / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{module} has no __all__")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    copy_package(Path(sys.argv[1]))
