"""What a command does before its work."""

import gc
import os
import platform
import signal
import subprocess
import sys

import pytest

from lora_plugins.cli import INTERRUPTED, TERMINATED, importing, without_collections
from tests.core.processes import run_python


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


CAUGHT = """
import signal, sys
from lora_plugins.cli import importing
from lora_plugins.cli.starting import stopping_at_sigterm
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a script does not have
with stopping_at_sigterm(), importing():
    try:
        signal.raise_signal(signal.Signals[sys.argv[1]])
    except BaseException:  # as packages do around what they can do without
        pass
print("went on")
"""


@pytest.mark.parametrize(
    ("name", "code", "said"), [("SIGINT", INTERRUPTED, "Interrupted."), ("SIGTERM", TERMINATED, "Ended by SIGTERM.")]
)
def test_a_signal_during_imports_is_not_lost(name, code, said):
    done = subprocess.run([sys.executable, "-c", CAUGHT, name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{said}\n")


STOPPED = """
import os, signal, sys
from lora_plugins.cli.main import main
{before}
moved = os.rename
os.rename = os.replace = lambda *paths: (signal.raise_signal(signal.SIGTERM), moved(*paths))
sys.exit(main(["new-plugin", "my-plugin"]))
"""


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        pytest.param("", TERMINATED, "Ended by SIGTERM.\n", id="a program"),
        pytest.param("signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))", 7, "", id="a handler of the program's"),
    ],
)
def test_sigterm_removes_what_is_temporary(tmp_path, before, code, said):
    done = run_python("-c", STOPPED.format(before=before), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, said)
    assert [*tmp_path.iterdir()] == []


FORKED = """
import os, signal, sys
from lora_plugins.cli.starting import stopping_at_sigterm
with stopping_at_sigterm():
    child = os.fork()
    if not child:
        signal.raise_signal(signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_sigterm_ends_a_forked_process_without_a_word():
    done = run_python("-c", FORKED)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signal.SIGTERM)}\n", "")


class Loop:
    """Is freed by a collection, with a call in which Python ignores what is raised."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_during_the_collection_after_imports_is_not_lost():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), without_collections():
            Loop()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_afterwards_what_it_was(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with importing():
            assert (signal.getsignal(signal.SIGINT) is handler) == (handler is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing", "count", "policy"],
)
def test_waiting_threads_leave_a_processor_to_other_programs(said, spins):
    code = """
import contextlib, io, os, sys
from lora_plugins.cli.main import main

assert "torch" not in sys.modules
with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("SPINCOUNT", "WAIT_POLICY"))}
    command, environment = [sys.executable, "-c", code], {**environment, **said}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (spins, "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to GNU's C library")
@pytest.mark.parametrize(
    ("said", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False)], ids=["nothing", "threshold"]
)
def test_memory_of_a_step_is_there_for_the_next(said, kept):
    code = """
import contextlib, ctypes, io, resource
from lora_plugins.cli.main import main

with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
asked = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = ctypes.c_void_p(library.malloc(2**26))
    ctypes.memset(memory, 1, 2**26)
    library.free(memory)
    asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(asked[1] < 2**26 / 2**21)  # in the largest pages there are 32
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command, environment = [sys.executable, "-c", code], {**environment, **said}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(kept), "")
