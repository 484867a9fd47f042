"""The tutorial for plugin authors shows the files of the example package, to the letter, and names every check."""

import re
from pathlib import Path

import pytest

from lora_plugins.testing import INIT_CHECKS, LAYER_CHECKS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "plugins.md").read_text()
SHOWN = dict(re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL))
EXAMPLE = ROOT / "tests" / "plugin_example"


def test_every_file_of_the_package_is_shown():
    files = {str(path.relative_to(EXAMPLE)) for suffix in ("toml", "py") for path in EXAMPLE.rglob(f"*.{suffix}")}
    assert set(SHOWN) == files


@pytest.mark.parametrize("path", SHOWN)
def test_a_file_is_shown_as_it_is(path):
    assert SHOWN[path] == (EXAMPLE / path).read_text()


def test_every_check_is_named():
    assert [name for name in (*LAYER_CHECKS, *INIT_CHECKS) if f"`{name}`" not in TEXT] == []
