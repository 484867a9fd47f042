"""`lora-plugins new-plugin NAME`: writes a package with a layer type, an init, and tests that use the kit."""

import os
import re
from argparse import Namespace
from importlib import resources
from pathlib import Path
from string import Template

from lora_plugins.errors import ConfigError
from lora_plugins.plugins import KINDS, build_registry
from lora_plugins.utils import folder_beside
from lora_plugins.writable import check_writable_folder

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "{package}/__init__.py": "init.py.txt",
    "{package}/layers.py": "layers.py.txt",
    "{package}/inits.py": "inits.py.txt",
    "tests/test_plugin.py": "test_plugin.py.txt",
}
"""The files of a package, and the templates they are made from."""


def run(given: Namespace) -> int:
    """Writes a package, and prints what to do with it."""
    folder = write(given.name, given.into)
    print(f"Wrote {folder}. Next:\n\n  cd {folder}\n  pip install -e '.[test]'\n  pytest\n  lora-plugins plugins")
    return 0


def write(name: str, into: Path) -> Path:
    """Writes the package of a new plugin into a folder; returns its own folder, `lora-plugins-NAME`.

    Raises:
        ConfigError: If the name is invalid or taken by an installed plugin, or if the folder exists already.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a plugin. Use lower-case letters, digits and dashes, as in 'my-layer'."
        )
    values = {
        "distribution": f"lora-plugins-{name}",
        "package": f"lora_plugins_{name.replace('-', '_')}",
        "init": name.replace("-", "_"),
        "class_name": "".join(part.capitalize() for part in name.split("-")),
    }
    _check_free(values["init"])
    folder = into / values["distribution"]
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Choose another name, or another folder with --into.")
    if not into.is_dir():
        raise ConfigError(f"{into} is not a folder. Make it first, or choose another with --into.")
    check_writable_folder(folder, "The package")
    templates = resources.files("lora_plugins.cli") / "template"
    texts = {path: (templates / template).read_text(encoding="utf-8") for path, template in FILES.items()}
    try:
        with folder_beside(folder) as temporary:
            made = temporary / folder.name
            for path, text in texts.items():
                target = made / path.format(**values)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(Template(text).substitute(values), encoding="utf-8")
            os.rename(made, folder)
    except OSError as error:
        error.filename = str(folder)  # and not what is in the temporary folder
        del error.filename2
        raise
    return folder


def _check_free(name: str) -> None:
    registry = build_registry()
    for kind in KINDS:
        if name in registry.of(kind):
            owner = registry.of(kind)[name].info.owner
            raise ConfigError(f"The {kind.title} {name!r} is taken, by {owner}. Choose another name.")
