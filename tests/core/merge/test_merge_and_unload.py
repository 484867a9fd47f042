"""Merging for good goes layer by layer, can be stopped anywhere, and takes nobody's memory."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from lora_plugins import LoraConfig, LoraModel, MergeError, StateError


def adapt(model: nn.Module) -> LoraModel:
    return LoraModel(model, LoraConfig(r=2, init="none"))


class OfAnInput(SpectralNorm):
    """Looks at what the layer is called with, as the spectral norms of convolutions of DUE and lightning-uq-box do."""

    def __call__(self, module, inputs):
        assert inputs[0].ndim == 2
        super().__call__(module, inputs)


def normed_for_an_input(layer: nn.Module) -> nn.Module:
    (hook,) = nn.utils.spectral_norm(layer)._forward_pre_hooks.values()
    hook.__class__ = OfAnInput
    return layer


HOOKS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm of an input": normed_for_an_input,
    "pruned": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_what_a_hook_will_compute_is_merged_not_what_it_computed_last(hook, training):
    models = [nn.Sequential(hook(nn.Linear(5, 4))).double() for _ in range(2)]
    x = torch.randn(3, 5).double()
    for model in models:
        model(x)
        adapt(model)
    models[0].load_state_dict(models[1].state_dict())
    with torch.no_grad():
        expected = models[1].eval()(x)
    LoraModel(models[0].train(training)).merge_and_unload()
    torch.testing.assert_close(models[0].eval()(x), expected, rtol=1e-14, atol=1e-14)


COMPUTED = HOOKS | {
    "weight_norm of parametrizations": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("computed", COMPUTED.values(), ids=COMPUTED)
def test_what_was_frozen_before_is_frozen_again(computed, frozen):
    model = nn.Sequential(computed(nn.Linear(5, 4))).requires_grad_(not frozen)
    model(torch.randn(3, 5))
    adapt(model).merge_and_unload(max_error=10)
    assert [parameter.requires_grad for parameter in model.parameters()] == [not frozen] * 2


def doubled_bias(layer: nn.Module) -> nn.Module:
    class Double(nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    return nn.utils.parametrizations.weight_norm(nn.utils.parametrize.register_parametrization(layer, "bias", Double()))


def pruned_bias(layer: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(nn.utils.prune.l1_unstructured(layer, "bias", amount=0.5))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("computed", [doubled_bias, pruned_bias])
def test_what_computes_another_tensor_of_the_layer_stays(computed):
    model = nn.Sequential(computed(nn.Linear(5, 4))).double().eval()
    biases = {name for name in model.state_dict() if "bias" in name}
    lora, x = adapt(model), torch.randn(3, 5).double()
    expected = model(x)
    lora.merge_and_unload()
    torch.testing.assert_close(model(x), expected, rtol=1e-14, atol=1e-14)
    assert set(model.state_dict()) == {"0.weight", *biases}


def double_weight(layer: nn.Module, _: object) -> None:
    layer.weight = 2 * layer.half_weight


def test_a_weight_computed_in_an_unknown_way_is_refused_before_anything_changes():
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4)).double(), torch.randn(3, 5).double()
    layer = model[1]
    layer.half_weight = nn.Parameter(layer._parameters.pop("weight") / 2)
    layer.register_forward_pre_hook(double_weight)
    double_weight(layer, None)
    lora = adapt(model)
    expected = model(x)
    with pytest.raises(MergeError, match=r"'1\.weight' is not a parameter of its Linear:"):
        lora.merge_and_unload()
    assert torch.equal(model(x), expected)
    assert list(lora.adapters) == ["default"]


class TestInterrupted:
    """Merging for good is stopped in the middle."""

    @pytest.fixture(params=["each its own", "some shared"])
    def model(self, request):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double().eval()
        if request.param == "some shared":
            model[3].weight = model[1].weight
        adapt(model)
        return model

    @pytest.fixture
    def interrupted(self, model, monkeypatch):
        products = []

        def addmm(*args, **kwargs):
            products.append(args)
            if len(products) == 2:
                raise KeyboardInterrupt
            return torch.add(args[0], args[1] @ args[2], alpha=kwargs["alpha"])

        with monkeypatch.context() as patch:
            patch.setattr(torch, "addmm", addmm)
            with pytest.raises(KeyboardInterrupt):
                LoraModel(model).merge_and_unload()
        return model

    def test_the_model_computes_the_same_and_merging_goes_on(self, model, request):
        x = torch.randn(2, 4).double()
        expected, merged = model(x), LoraModel(copy.deepcopy(model)).merge_and_unload()
        request.getfixturevalue("interrupted")
        assert len({type(layer) for layer in model}) == 2
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        LoraModel(model).merge_and_unload()
        assert {type(layer) for layer in model} == {nn.Linear}
        torch.testing.assert_close(model.state_dict(), merged.state_dict(), rtol=1e-15, atol=1e-15)

    @pytest.mark.parametrize(
        "act",
        [
            LoraModel.unload,
            LoraModel.merge_adapter,
            LoraModel.unmerge_adapter,
            lambda lora: lora.save_adapter("never"),
            lambda lora: lora.add_adapter("b", LoraConfig()),
            lambda lora: lora.model.load_state_dict(lora.model.state_dict()),
            lambda lora: lora.model.train()(torch.ones(2, 4).double()),
        ],
        ids=["unload", "merge", "unmerge", "save", "add", "load", "train"],
    )
    def test_all_else_is_refused(self, interrupted, act):
        with pytest.raises(StateError, match=r"merge_and_unload\(\) was stopped.* Call it again"):
            act(LoraModel(interrupted))

    def test_before_the_first_weight_nothing_has_changed(self, model, monkeypatch):
        x = torch.ones(2, 4).double()
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.delattr(torch, "addmm")
            with pytest.raises(AttributeError):
                LoraModel(model).merge_and_unload()
        assert torch.equal(model(x), expected)
        LoraModel(model).unload()

    @pytest.mark.parametrize("line", range(0, 950, 15))
    def test_at_any_line(self, model, line):
        """A KeyboardInterrupt in the lines that change the model, and then another call."""
        x, lines = torch.ones(2, 4).double(), itertools.count()
        traced = ("merge.py", "merge_for_good.py", "weight_updates.py", "computed.py", "state.py", "spare_memory.py")
        expected = model(x)

        def trace(frame, event, _):
            if not frame.f_code.co_filename.endswith(traced):
                return None
            if event == "line" and frame.f_code.co_name != "merge_and_unload" and next(lines) == line:
                raise KeyboardInterrupt
            return trace

        lora, before = LoraModel(model), sys.gettrace()
        sys.settrace(trace)
        try:
            lora.merge_and_unload()
        except KeyboardInterrupt:
            sys.settrace(before)
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
            lora.merge_and_unload()
        finally:
            sys.settrace(before)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        assert {type(layer) for layer in model} == {nn.Linear}
        assert all(parameter.requires_grad for parameter in model.parameters())


PEAK = """
import resource
from torch import nn
from lora_plugins import LoraConfig, LoraModel

model = nn.Sequential(*(nn.Linear(1024, 2048) for _ in range(32)))  # 8 MiB each
lora = LoraModel(model, LoraConfig(init="none"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lora.merge_and_unload()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


def test_the_weights_are_never_in_memory_twice():
    peak = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, check=True, text=True).stdout
    assert float(peak) < 128  # of 256
