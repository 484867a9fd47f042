"""Which kernels are used: found in their folder, switched off by name, reported with the reason."""

import pkgutil
import re
import subprocess
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraError, LoraModel
from lora_plugins.kernels import DISABLE_VARIABLE, KernelStatus, disabled_kernels, entries, kernel_report, linear_2d
from lora_plugins.kernels._kernel import Kernel, missing_from_torch
from lora_plugins.kernels._operation import operation
from lora_plugins.kernels._switches import _Switches, active_kernels
from tests.core.processes import run_python

FILES = sorted(info.name for info in pkgutil.iter_modules(entries.__path__))


def python(code: str, disable: str) -> subprocess.CompletedProcess[str]:
    return run_python("-P", "-c", code, **{DISABLE_VARIABLE: disable})


REPORT = "from lora_plugins.kernels import kernel_report; print([(s.name, s.reason) for s in kernel_report()])"


def reasons(disable: str) -> dict[str, str]:
    return dict(eval(python(REPORT, disable).stdout))


class TestTheReport:
    def test_it_lists_the_files_of_the_folder(self):
        assert [status.name for status in kernel_report()] == FILES

    def test_it_says_what_switched_a_kernel_off(self):
        with disabled_kernels("all"):
            assert {status.reason for status in kernel_report()} <= {"switched off by disabled_kernels"}
            assert not any(status.used for status in kernel_report())

    def test_it_says_why_a_kernel_is_not_for_this_machine(self, monkeypatch):
        monkeypatch.delenv(DISABLE_VARIABLE, raising=False)
        unfit = Kernel("triton", "linear_2d", lambda: "there is no GPU", lambda *_: True, torch.mm)
        fit = replace(unfit, name="other", available=lambda: "")
        switches = _Switches([unfit, fit, replace(fit, operation="scaled_product")])
        assert switches.active == {"linear_2d": (fit,), "scaled_product": (replace(fit, operation="scaled_product"),)}
        assert switches.report() == [
            KernelStatus("other", ("linear_2d", "scaled_product"), ""),
            KernelStatus("triton", ("linear_2d",), "there is no GPU"),
        ]

    def test_a_name_that_this_torch_lacks_is_named(self):
        assert missing_from_torch("nn.Linear", "_C._no_such") == f"torch {torch.__version__} has no torch._C._no_such"
        assert missing_from_torch("nn.Linear") == ""


class TestTheVariable:
    def test_it_names_single_kernels(self):
        names = [*FILES[:2]]
        found = reasons(" , ".join([*names, ""]))
        switched_off = [name for name, reason in found.items() if reason == f"switched off by {DISABLE_VARIABLE}"]
        assert switched_off == names

    def test_all_is_all(self):
        assert reasons("all") == dict.fromkeys(FILES, f"switched off by {DISABLE_VARIABLE}")

    def test_an_unknown_name_stops_the_first_computation(self):
        name = FILES[-1][:-1]
        code = "import torch; from lora_plugins.kernels import linear_2d; linear_2d(torch.ones(2, 2), torch.ones(2, 2))"
        run = python(code, name)
        assert run.returncode == 1
        expected = f"{DISABLE_VARIABLE} names {name!r}, which is not a kernel. Did you mean {FILES[-1]!r}"
        assert expected in run.stderr.splitlines()[-1]


class TestDisabledKernels:
    def switched_off(self) -> set[str]:
        return {status.name for status in kernel_report() if status.reason == "switched off by disabled_kernels"}

    def test_it_ends_with_its_block(self):
        before = kernel_report()
        with disabled_kernels(FILES[0]):
            with suppress(ZeroDivisionError), disabled_kernels(FILES[1]):
                assert self.switched_off() == {*FILES[:2]}
                raise ZeroDivisionError
            assert self.switched_off() == {FILES[0]}
        assert kernel_report() == before

    def test_no_names_switch_nothing_off(self):
        before = kernel_report()
        with disabled_kernels():
            assert kernel_report() == before

    @pytest.mark.parametrize(
        ("name", "offer"), [("al", "Did you mean 'all'"), ("zzz", "There is 'all', ")], ids=["near", "far"]
    )
    def test_an_unknown_name_is_refused(self, name, offer):
        expected = re.escape(f"disabled_kernels names {name!r}, which is not a kernel. {offer}")
        with pytest.raises(LoraError, match=expected), disabled_kernels(name):
            pass

    @pytest.mark.parametrize("name", FILES)
    def test_a_step_without_one_kernel_is_the_same(self, name):
        found = []
        for names in ((), (name,)):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(4, 4, 5, groups=4), nn.GELU(), nn.Flatten(1), nn.Linear(16, 3)).double()
            LoraModel(model, LoraConfig(r=2, init="none", memory="low"))
            x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
            with disabled_kernels(*names):
                model(x).sin().sum().backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class TestOperations:
    def test_the_first_kernel_that_applies_computes_a_call(self, monkeypatch):
        monkeypatch.delenv(DISABLE_VARIABLE, raising=False)

        @operation
        def double(x: Tensor, times: int = 1) -> Tensor:
            return 2 * x

        calls = []

        def kernel(name: str, least: int) -> Kernel:
            def run(x: Tensor, times: int = 1) -> Tensor:
                calls.append(name)
                return 2 * x

            return Kernel(name, "double", lambda: "", lambda x, times=1: len(x) >= least, run)

        switches = _Switches([kernel("long", 9), kernel("middle", 5)])
        monkeypatch.setattr("lora_plugins.kernels._switches._switches", lambda: switches)
        for length in (9, 5, 1):
            torch.testing.assert_close(double(torch.ones(length), times=2), torch.full((length,), 2.0))
        assert calls == ["long", "middle"]
        assert [double.find(torch.ones(length)) for length in (5, 1)] == [switches.kernels[1], None]
        pinned = double.pinned()
        switches.switch({"middle": "a test"})
        assert double.find(torch.ones(5)) is None
        pinned(torch.ones(5))
        assert calls == ["long", "middle", "middle"]

    def test_a_compiler_sees_ordinary_operations_only(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return graph.forward

        compiled = torch.compile(linear_2d, backend=backend, fullgraph=True)
        with torch.no_grad():
            compiled(torch.randn(260, 72), torch.randn(64, 72))
        assert graphs == [[torch._C._nn.linear]]

    def test_kernels_are_named_after_their_files_and_compute_known_operations(self):
        from lora_plugins.kernels import _autograd, conv, conv_geometry, dropout, linear, matmul, rescaled
        from lora_plugins.kernels._operation import Operation

        rooms = (_autograd, conv, conv_geometry, dropout, linear, matmul, rescaled)
        known = {value.name for room in rooms for value in vars(room).values() if isinstance(value, Operation)}
        for name in FILES:
            module = __import__(f"{entries.__name__}.{name}", fromlist=["KERNELS"])
            assert {kernel.name for kernel in module.KERNELS} == {name}
            assert {kernel.operation for kernel in module.KERNELS} <= known
        assert active_kernels("no_such_operation") == ()
