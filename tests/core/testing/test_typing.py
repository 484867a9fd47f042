"""What a plugin author is shown and given passes `mypy --strict` as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_plugins.cli.new_plugin import write

pytest.importorskip("mypy")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # mypy reads all of torch once

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """Runs mypy over a package, with the sources of lora_plugins laid out as they are installed."""
    work = tmp_path_factory.mktemp("mypy")
    shutil.copytree(ROOT / "lora_plugins", work / "src" / "lora_plugins")
    options = ["--strict", "--cache-dir", str(work / "cache"), "--config-file", ""]

    def check(package: Path) -> str:
        command = [sys.executable, "-m", "mypy", *options, "-p", package.name]
        path = f"{work / 'src'}:{package.parent}"
        done = subprocess.run(command, env={"MYPYPATH": path}, capture_output=True, text=True, check=False, cwd=work)
        return done.stdout

    return check


def test_the_package_of_the_tutorial(strict):
    assert "Success" in strict(ROOT / "tests" / "plugin_example" / "lora_plugins_example")


def test_the_package_that_new_plugin_writes(strict, tmp_path):
    assert "Success" in strict(write("my-layer", tmp_path) / "lora_plugins_my_layer")


def test_that_check_can_fail(strict, tmp_path):
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "__init__.py").write_text("from lora_plugins import Slot\n\nslot: int = Slot('weight')\n")
    assert 'variable has type "int"' in strict(tmp_path / "wrong")
