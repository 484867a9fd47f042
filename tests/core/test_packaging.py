"""The wheel holds every module of the three folders, under the names that they are imported by."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"lora_plugins": "lora_plugins", "integrations": "lora_plugins/integrations", "tasks": "lora_plugins/tasks"}
"""Folders of the repository, and where an installation has them."""

PYTEST_PLUGIN = ("lora_plugins/integrations/pytest/", "pytest_lora_plugins/")
"""Where the pytest plugin would be by its folder, and where it is: pytest must not import torch to load it."""


def sources():
    """The files of the three folders by the path that the wheel should have them under."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}".replace(*PYTEST_PLUGIN)
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, so that the build leaves nothing behind."""
    pytest.importorskip("packaging", "24.2")  # what setuptools needs to build; the package itself runs with 22
    work = tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, work / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (work / "source").mkdir(exist_ok=True)
            shutil.copy(source, work / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(work), str(work / "source")], check=True)
    (path,) = work.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_every_source_file_is_in_the_wheel(wheel):
    assert sorted(sources() - set(wheel)) == []


def test_nothing_else_is_installed(wheel):
    extra = {name for name in set(wheel) - sources() if ".dist-info/" not in name}
    assert extra == set()
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {
        "lora_plugins",
        "pytest_lora_plugins",
    }


def test_entry_points_and_marker_are_in_the_wheel(wheel):
    (points,) = [data.decode() for name, data in wheel.items() if name.endswith("entry_points.txt")]
    own = ("[lora_plugins]", "layers = lora_plugins.layers", "inits = lora_plugins.inits")
    scripts = (
        "[console_scripts]",
        "lora-plugins = lora_plugins.cli.main:main",
        "lightning = lora_plugins.cli.main:main",
    )
    commands = (
        "[lora_plugins.commands]",
        "tasks = lora_plugins.tasks.command_table:COMMANDS",
        "[lora_plugins.recipes]",
        "tasks = lora_plugins.tasks",
    )
    for line in (*own, *scripts, *commands, "[pytest11]", "lora_plugins = pytest_lora_plugins"):
        assert line in points
    assert "lora_plugins/py.typed" in wheel


def test_the_core_needs_five_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("=")[0] for requirement in project["dependencies"]}
    assert names == {"numpy", "packaging", "pluggy", "safetensors", "torch"}
