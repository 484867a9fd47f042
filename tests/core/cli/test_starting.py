"""What a command does before its work."""

import gc

import pytest

from lora_plugins.cli import without_collections


@pytest.mark.parametrize("collects", [True, False])
def test_collecting_goes_on_as_before(collects):
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(KeyError), without_collections():
            {}["nothing"] if not gc.isenabled() else None
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
