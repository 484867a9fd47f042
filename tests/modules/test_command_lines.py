"""The YAML files of docs/howto/other_cli.md, run by the command lines of torchgeo and terratorch, word for word."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_plugins.files import MANIFEST

pytestmark = [pytest.mark.modules, pytest.mark.timeout(1200)]

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "other_cli.md"


def _write(path: Path, values: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def _land_use(folder: Path) -> None:
    """Writes a picture of each of the 21 classes, and the files that split them, as torchgeo's UCMerced has them."""
    random, names = np.random.default_rng(0), [f"class{at:02}" for at in range(21)]
    for name in names:
        _write(folder / "UCMerced_LandUse" / "Images" / name / f"{name}.tif", random.integers(0, 255, (32, 32, 3)))
    for split in ("train", "val", "test"):
        (folder / f"uc_merced-{split}.txt").write_text("\n".join(f"{name}.tif" for name in names))


def _masks(folder: Path) -> None:
    """Writes pictures and masks, for training and for validation."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for at in range(4):
            _write(folder / split / "images" / f"{at}.tif", random.integers(0, 255, (64, 64, 3)))
            _write(folder / split / "masks" / f"{at}.tif", random.integers(0, 3, (64, 64)))


def _call(folder: Path, package: str, command: str, *arguments: str) -> str:
    words = [str(Path(sys.executable).with_name(package)), command, "--config", f"{package}.yaml", *arguments]
    options = {"cwd": folder, "capture_output": True, "text": True, "env": {**os.environ, "COLUMNS": "200"}}
    done = subprocess.run(words, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("package", "data"), [("torchgeo", _land_use), ("terratorch", _masks)])
def test_fit_validate_and_test(tmp_path, package, data):
    pytest.importorskip(package)
    (text,) = re.findall(rf"```yml\n(# {package}\.yaml.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / f"{package}.yaml").write_text(text)
    data(tmp_path / "data")
    assert "layers adapted" in _call(tmp_path, package, "fit")
    assert (tmp_path / "runs" / "adapter" / MANIFEST).is_file()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    for command in ("validate", "test"):
        assert _call(tmp_path, package, command, "--ckpt_path", str(checkpoint))
