"""The pytest plugin, in pytest processes of their own."""

import pytest

from tests.core.processes import run_python
from tests.slow import slow_but

TESTS = """
import torch
from torch import nn
from lora_plugins import InitPlugin, RowMajorPlugin

class Plain(RowMajorPlugin):
    name = "plain"
    module_type = nn.Bilinear

class Dead(InitPlugin):
    name = "dead"
    def fill(self, context):
        context.A.zero_()
        context.B.zero_()
        return {}

def test_layer(layer_check):
    inputs = lambda layer: (torch.randn(5, 2), torch.randn(5, 3))
    layer_check(Plain(), lambda: nn.Bilinear(2, 3, 4), inputs, skip=["compile"])

def test_init(init_check):
    init_check(Dead())
"""

PLACED = """
import pytest
import torch
from torch import nn
from lora_plugins import RowMajorPlugin
from lora_plugins.storages.nf4 import NF4Storage
from lora_plugins.variants.dora import DoraVariant

class Told(RowMajorPlugin):
    name = "told"
    module_type = nn.Bilinear

    def to_matrix(self, weight):
        print("layer on", weight.device)
        return super().to_matrix(weight)

def test_layer(layer_check):
    inputs = lambda layer: (torch.randn(5, 2), torch.randn(5, 3))
    layer_check(Told(), lambda: nn.Bilinear(2, 3, 4), inputs)

class Stored(NF4Storage):
    def store(self, weight, options):
        print("storage on", weight.device)
        return super().store(weight, options)

def test_storage(storage_check):
    storage_check(Stored())

def test_variant(variant_check):
    variant_check(DoraVariant())
"""

UNRELATED = """
import sys

def test_nothing_heavy_is_imported():
    assert [name for name in ("torch", "lora_plugins") if name in sys.modules] == []
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest, with every warning an error, on a file of its own."""

    def run_pytest(text, *options):
        (tmp_path / "test_it.py").write_text(text)
        command = ["-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
        return run_python(*command, *options, "test_it.py", cwd=tmp_path, PYTEST_ADDOPTS="")

    return run_pytest


def test_each_check_is_a_test_of_its_own(run):
    from lora_plugins.testing import INIT_CHECKS, LAYER_CHECKS

    done = run(TESTS, "-v")
    for name in set(LAYER_CHECKS) - {"compile"}:
        assert f"test_it.py::test_layer[{name}] PASSED" in done.stdout
    assert "test_it.py::test_layer[compile] SKIPPED" in done.stdout
    assert "test_it.py::test_init[trainable] FAILED" in done.stdout
    assert "usual cause: both factors start at zero" in done.stdout
    failed = done.stdout.count(" FAILED ")
    assert done.stdout.count(" PASSED ") == len(LAYER_CHECKS) - 1 + len(INIT_CHECKS) - failed
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_device_is_where_it_checks(run, device):
    """On meta tensors nothing passes that compares values, and no adapter is added, but everything is there."""
    places = [] if device == "cpu" else ["--lora-device", device]
    said = run(PLACED, "-rA", "-k", "law or dense or shapes", *places).stdout
    found = {line for line in said.splitlines() if line.startswith(("layer on", "storage on"))}
    assert found == {f"{what} on {device}" for what in ("layer", "storage")}
    assert ("'weight' is on the meta device" in said) == (device == "meta")


@pytest.mark.parametrize("device", slow_but(["cuda:99", "cpuu", ""], ["cuda:99"]))
def test_a_device_that_torch_cannot_use_is_an_error_at_the_start(run, device):
    done = run(TESTS, "--lora-device", device)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith(f"ERROR: --lora-device is {device!r}, which torch cannot use here: ")
    assert "FAILED" not in done.stdout


def test_a_project_that_does_not_use_it_imports_nothing(run):
    done = run(UNRELATED)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_can_be_switched_off(run):
    done = run(TESTS, "-p", "no:lora_plugins")
    assert "fixture 'layer_check' not found" in done.stdout
