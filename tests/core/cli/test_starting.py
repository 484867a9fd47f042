"""What a command does before its work, and where none is done."""

import gc
import subprocess
import sys

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


def test_a_process_that_ends_at_once_still_ends_as_it_should():
    said = "import gc, weakref; from lora_plugins.cli.starting import ends_at_once; ends_at_once(); ends_at_once()\n"
    cycle = "class A: pass\na = A(); a.a = a; kept = weakref.finalize(a, print, 'finalized'); print('ran')"
    run = subprocess.run([sys.executable, "-c", said + cycle], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("ran\nfinalized\n", "")
