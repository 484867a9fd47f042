"""What all tests share: one thread for torch, so that parallel runs do not fight, and a seed for each test."""

import gc
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# For the processes that tests start; and without it, Lightning's launchers give this one all cores from then on.
os.environ["OMP_NUM_THREADS"] = "1"

# A package of a third party, with tests of its own, which run where it is installed.
collect_ignore = ["plugin_example", "plugin_format", "plugin_storage"]

# Tests, in this process and in others, find `tests` and `benchmarks` here, and lora_plugins where it is installed: the
# checkout itself must not be on the path, since its folder lora_plugins would hide a wheel that is to be tested.
_BESIDE = tempfile.TemporaryDirectory()
for _name in ("tests", "benchmarks"):
    (Path(_BESIDE.name) / _name).symlink_to(Path(__file__).parent.parent / _name)
sys.path.append(_BESIDE.name)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_BESIDE.name, os.environ.get("PYTHONPATH"))))
os.environ["PYTHONSAFEPATH"] = "1"


def pytest_addoption(parser):
    """Adds the device, and the option `timeout` of pyproject.toml where pytest-timeout, which reads it, is missing."""
    parser.addoption(
        "--device", default="cpu", help="where tests that take the fixture `device`, and the kit, run: cpu, cuda, ..."
    )
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds for a test; read by pytest-timeout")


def pytest_configure(config):
    """Refuses a device that nothing can be computed on here; hands it to the kit, where its pytest plugin is loaded."""
    name = config.option.device
    try:
        torch.zeros(1, device=name).tolist()  # not on meta
    except Exception as error:  # each backend raises its own
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(f"--device is {name!r}, which torch cannot use here: {reason}") from error
    if hasattr(config.option, "lora_device"):
        config.option.lora_device = config.option.device


def pytest_collection_modifyitems(config, items):
    """Leaves out, on another device, the tests that compute on the CPU whatever `--device` says."""
    if config.option.device != "cpu":
        kit = Path(__file__).parent / "core" / "testing"
        there = {item: "device" in item.fixturenames or kit in item.path.parents for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not there[item]])
        items[:] = [item for item in items if there[item]]


@pytest.fixture(scope="session")
def _imported():
    """How many modules there were when objects were last taken out of the collector's search."""
    return {"modules": 0}


@pytest.fixture(autouse=True)
def frozen_imports(_imported):
    """Takes what a test imported out of the garbage collector's search.

    A Trainer asks for whole collections as it ends, each of which otherwise goes through the objects of all libraries
    that some test has imported: 0.5 s with transformers, most of the time of a short run.
    """
    yield
    if len(sys.modules) != _imported["modules"]:
        gc.collect()
        gc.freeze()
        _imported["modules"] = len(sys.modules)


@pytest.fixture(scope="session")
def device(request):
    """Where tests that have a choice run."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def swapped_by_conversions():
    """Lets conversions swap tensors, as they always do for those of a class of its own, such as quantized ones."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture(autouse=True)
def seeded(request):
    """Starts every test from the same random state, settings and environment, whichever tests ran before it."""
    if request.config.getoption("--device") == "cpu":
        torch.default_generator.manual_seed(0)  # 500 times as fast: for a GPU that is not in use, torch keeps the stack
    else:
        torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)  # a Trainer that asked for them leaves it so, and metrics take minutes
    for name in os.environ.keys() - environment.keys():  # Lightning leaves its seed there, and addresses of processes
        del os.environ[name]
    os.environ.update(environment)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # it leaves that to the end of the process
