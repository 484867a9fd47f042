"""Every kind of plugins has a kit, a hook that the docs show, and a section in the docs for authors."""

from pathlib import Path

import pytest

from lora_plugins.plugins import KINDS
from lora_plugins.testing import KITS

DOCS = Path(__file__).parents[3] / "docs"


def test_there_is_a_kit_for_each_kind():
    assert [kit.kind for kit in KITS] == [*KINDS]
    assert [kit.fixture for kit in KITS] == [
        "layer_check",
        "init_check",
        "variant_check",
        "format_check",
        "storage_check",
    ]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_docs_show_its_hook(kind):
    assert f"## {kind.hook_name}(registrar)" in (DOCS / "hooks.md").read_text()


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.kind.name)
def test_the_docs_name_what_checks_it(kit):
    pages = "".join(path.read_text() for path in DOCS.rglob("*.md"))
    assert kit.check.__name__ in pages
    assert kit.fixture in pages
