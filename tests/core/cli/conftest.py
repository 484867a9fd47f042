"""What the tests of the commands share."""

import sys

import pytest


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Puts a distribution, of version 1.5, with modules and entry points on the path of this test."""
    made = set()

    def make(name, points, **modules):
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(points)
        monkeypatch.syspath_prepend(tmp_path)
        made.update(modules)

    yield make
    for module in made & sys.modules.keys():
        del sys.modules[module]
