"""Each kernel can be deleted: without its file, the package computes the same law, and its other tests are green."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_plugins
from lora_plugins.kernels import entries

ROOT = Path(__file__).parent.parent.parent.parent
PACKAGE = Path(lora_plugins.__file__).parent
FILES = sorted(info.name for info in pkgutil.iter_modules(entries.__path__))

FAST = "entries or law or ordinary"
"""Shows in some seconds that results are right and that other kernels do not need this one."""


def run_tests_without(name: str, folder: Path, *arguments: str) -> str:
    """Runs tests on a copy of the installed package that lacks one kernel; returns the last lines."""
    copy = folder / "lora_plugins"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "kernels" / "entries" / f"{name}.py").unlink()
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    check = f"import lora_plugins; assert lora_plugins.__file__.startswith({str(folder)!r})"
    subprocess.run([sys.executable, "-c", check], check=True, env=environment, cwd=ROOT)
    ignored = f"--ignore={Path(__file__).relative_to(ROOT)}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ignored, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(900)
def test_without_one_kernel_the_others_are_green(name, tmp_path):
    folders = [f"tests/core/{folder}" for folder in ("kernels", "layers", "merge")]
    output = run_tests_without(name, tmp_path, "-k", FAST, *folders)
    assert f"entries/test_{name}.py" in output  # skipped, and said so


@pytest.mark.parametrize("name", FILES)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_without_one_kernel_the_core_is_green(name, tmp_path):
    run_tests_without(name, tmp_path, "tests/core")
