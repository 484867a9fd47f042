"""Merging writes what the law says, loses nothing in silence, and is taken back bit for bit."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_plugins import LoraConfig, LoraModel, MergeError, StateError

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 4)).to(dtype)


def adapt(model: nn.Module, name: str = "default", **fields) -> LoraModel:
    return LoraModel(model, LoraConfig(**{"r": 2, "init": "none", **fields}), name)


@HALF
def test_twenty_rounds_restore_every_bit(dtype):
    model = model_of(dtype)
    lora = adapt(model, alpha=16)
    before = copy.deepcopy(model.state_dict())
    for _ in range(20):
        lora.merge_adapter(max_error=1)
        assert not torch.equal(model[0].weight, before["0.weight"])
        lora.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@HALF
def test_rounds_once_from_float32(dtype):
    model = model_of(dtype)
    lora = adapt(model)
    weight = model[2]._parameters["weight"].detach()
    A, B = model[2].lora_A["default"], model[2].lora_B["default"]
    expected = (weight.double() + (8 / 2) * B.double() @ A.double()).to(dtype)
    lora.merge_adapter(max_error=1)
    # One unit in the last place where the sum in float32 rounds to the other side of a tie.
    assert (model[2].weight != expected).float().mean() < 1e-2
    torch.testing.assert_close(model[2].weight, expected, rtol=torch.finfo(dtype).eps, atol=0, check_dtype=True)


def test_a_tiny_update_into_bfloat16_is_refused_and_nothing_changes():
    model = model_of(torch.bfloat16)
    lora = adapt(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B["default"].mul_(1e-4)
    before = copy.deepcopy(model.state_dict())
    for merge in (lora.merge_adapter, lora.merge_and_unload):
        with pytest.raises(MergeError, match=r"would lose \d+% of the update of '\d\.weight' \(torch\.bfloat16\)"):
            merge()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert lora.merged_adapters == ()
    report = lora.merge_adapter(max_error=1)
    assert report.worst > 0.5


def test_the_error_of_the_applied_update_is_reported():
    model = model_of()
    report = adapt(model).merge_adapter()
    assert [weight.name for weight in report.weights] == ["0.weight", "2.weight"]
    assert 0 < report.worst < 1e-5


def test_a_partial_merge_keeps_the_rest_active():
    model, x = model_of().double().eval(), torch.randn(2, 3, 5, 5).double()
    lora = adapt(model, "a")
    lora.add_adapter("b", LoraConfig(r=3, init="none", target_modules=["2"]))
    lora.set_adapter(["a", "b"])
    expected = model(x)
    lora.merge_adapter("a")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert type(model[0]) is nn.Conv2d
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.lora_A.b", "2.lora_B.b"]
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert lora.merged_adapters == ("a", "b")
    lora.unmerge_adapter()
    assert torch.equal(model(x), expected)


class TestWhileMerged:
    @pytest.fixture
    def lora(self):
        lora = adapt(model_of())
        lora.merge_adapter()
        return lora

    @pytest.mark.parametrize(
        ("act", "doing"),
        [
            (lambda lora: lora.save_adapter("never"), "Saving an adapter"),
            (lambda lora: lora.add_adapter("b", LoraConfig()), "Adding an adapter"),
            (lambda lora: lora.set_adapter("default"), "Changing the active adapter"),
            (lambda lora: lora.disable_adapter().__enter__(), "Disabling adapters"),
            (lambda lora: lora.delete_adapter("default"), "Deleting an adapter"),
            (lambda lora: lora.model.train()(torch.randn(1, 3, 5, 5)), "Training"),
            (lambda lora: lora.model.load_state_dict(model_of().state_dict()), "Loading a state dict"),
        ],
        ids=["save", "add", "set", "disable", "delete", "train", "load"],
    )
    def test_is_refused(self, lora, act, doing):
        with pytest.raises(StateError, match=rf"{doing} is not possible while 'default' is merged"):
            act(lora)

    def test_merging_again_is_refused(self, lora):
        with pytest.raises(StateError, match="merged already"):
            lora.merge_adapter("default")

    def test_inference_is_the_base_class(self, lora):
        assert type(lora.model[2]) is nn.Linear
        with torch.no_grad():
            lora.model.train()(torch.randn(1, 3, 5, 5))

    def test_unload_gives_the_base_back(self):
        base = model_of()
        model = copy.deepcopy(base)
        lora = adapt(model)
        lora.merge_adapter()
        lora.unload()
        assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_weight_shared_with_an_untargeted_layer_is_not_merged():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    lora = adapt(model, target_modules=["embed"])
    for merge in (lora.merge_adapter, lora.merge_and_unload):
        with pytest.raises(MergeError, match=r"'embed\.weight' is the same tensor as 'head\.weight'"):
            merge()
    with pytest.raises(MergeError, match=r"'embed\.weight' is the same tensor as 'head\.weight'"):
        lora.add_adapter("q", LoraConfig(target_modules=["embed"], init="loftq"))
    assert list(lora.adapters) == ["default"]


HOOKS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
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


def double_weight(layer: nn.Module, _: object) -> None:
    layer.weight = 2 * layer.half_weight


def test_a_weight_computed_in_an_unknown_way_is_refused_before_anything_changes():
    model, x = model_of().double(), torch.randn(2, 3, 5, 5).double()
    layer = model[2]
    layer.half_weight = nn.Parameter(layer._parameters.pop("weight") / 2)
    layer.register_forward_pre_hook(double_weight)
    double_weight(layer, None)
    lora = adapt(model)
    expected = model(x)
    with pytest.raises(MergeError, match=r"'2\.weight' is no parameter of its Linear,"):
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

    @pytest.mark.parametrize("line", range(0, 800, 13))
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


class TestMemoryOfUntouchedWeights:
    """Merging for good writes a merged weight where an untouched one was, unless that is somebody's."""

    @pytest.fixture
    def model(self):
        return nn.Sequential(*(nn.Linear(8, 4) for _ in range(3)))

    @staticmethod
    def merge(model: nn.Module) -> None:
        adapt(model).merge_and_unload()

    def test_is_used_again(self, model):
        before = [layer.weight.data_ptr() for layer in model]
        self.merge(model)
        assert [layer.weight.data_ptr() for layer in model][1:] == before[:-1]

    def test_is_used_again_for_another_shape_of_the_same_size(self):
        model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)).double()
        memory, lora = model[0].weight.data_ptr(), adapt(model)
        expected = model[1].weight.detach().clone()
        lora.merge_and_unload()
        assert model[1].weight.data_ptr() == memory
        torch.testing.assert_close(model[1].weight.detach(), expected, rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize(
        "known_to",
        [
            lambda weight: weight.detach(),
            lambda weight: weight.detach()[1:],
            lambda weight: weight.detach().numpy(),
            lambda weight: torch.utils.dlpack.from_dlpack(weight.detach()),
        ],
        ids=["tensor", "part", "array", "dlpack"],
    )
    def test_of_others_is_left_alone(self, model, known_to):
        others = [known_to(layer.weight) for layer in model]
        before = copy.deepcopy(others)
        self.merge(model)
        assert all((other == old).all() for other, old in zip(others, before, strict=True))

    def test_of_an_array_is_left_alone(self, model):
        arrays = [layer.weight.detach().clone().numpy() for layer in model]
        before = copy.deepcopy(arrays)
        for layer, array in zip(model, arrays, strict=True):
            layer.weight = nn.Parameter(torch.from_numpy(array))
        self.merge(model)
        assert all((array == old).all() for array, old in zip(arrays, before, strict=True))

    def test_shared_with_a_process_is_left_alone(self, model):
        """Another mapping of the memory, as another process has it."""
        others = []
        for layer in model:
            layer.weight.share_memory_()
            handle = layer.weight.untyped_storage()._share_filename_cpu_()
            storage = torch.UntypedStorage._new_shared_filename_cpu(*handle)
            others.append(torch.empty(0).set_(storage, 0, (4, 8)))
        before = copy.deepcopy(others)
        assert others[0].data_ptr() != model[0].weight.data_ptr()
        self.merge(model)
        torch.testing.assert_close(others, before, rtol=0, atol=0)


def test_memory_format_survives():
    model = model_of().to(memory_format=torch.channels_last)
    adapt(model).merge_and_unload()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_values_that_are_not_finite_are_refused():
    model = model_of()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"'2\.weight' or the update has values that are not finite"):
        adapt(model).merge_and_unload(max_error=float("inf"))


def test_all_of_a_variant_is_merged_for_now_and_then_for_good():
    model, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(3, 5).double()
    lora = adapt(model, variant="dora")
    expected = model(x)
    lora.merge_adapter()
    torch.testing.assert_close(lora.merge_and_unload()(x), expected, rtol=1e-13, atol=1e-13)


def test_a_refused_merge_moves_no_statistics():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)))
    adapt(model, variant="dora")
    before = copy.deepcopy(model.train().state_dict())
    with pytest.raises(MergeError, match="would lose"):
        LoraModel(model).merge_and_unload(max_error=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unmerging_nothing_is_an_error():
    with pytest.raises(StateError, match="Nothing is merged"):
        adapt(model_of()).unmerge_adapter()


LARGE = {
    "linear": lambda: nn.Linear(300, 200),
    "transposed": lambda: Conv1D(200, 300),
    "channels_last": lambda: nn.Conv2d(40, 50, 3).to(memory_format=torch.channels_last),
    "transposed_convolution": lambda: nn.ConvTranspose2d(40, 50, 3),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_large_layers_in_float32_take_the_exact_update(make):
    layer = make()
    single = adapt(nn.Sequential(layer), r=32, alpha=48)
    double = copy.deepcopy(single.model).double()
    stride = layer._parameters["weight"].stride()
    single.merge_and_unload()
    LoraModel(double).merge_and_unload()
    torch.testing.assert_close(layer.weight.double(), double[0].weight, rtol=0, atol=5e-7)  # of sums of 33 near 1
    assert layer.weight.stride() == stride


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_right_where_the_factors_nearly_cancel(dtype):
    model = nn.Sequential(nn.Linear(64, 48))
    lora = adapt(model, alpha=2)
    for factor in (model[0].lora_A, model[0].lora_B):
        factor.to(dtype)
    A, B = model[0].lora_A["default"], model[0].lora_B["default"]
    with torch.no_grad():
        A[1] = -A[0] + (1e-3 if dtype == torch.float32 else 1e-1) * A[1]
        B[:, 1] = B[:, 0]
    norm = torch.linalg.norm(B.detach().double() @ A.detach().double())
    weight = torch.linalg.norm(model[0]._parameters["weight"].detach().double())
    expected = torch.finfo(torch.float32).eps / 2 * float((weight + norm) / norm)
    assert 1e-7 < expected < 1e-3  # small enough for the bound to be what is reported
    assert lora.merge_adapter().worst == pytest.approx(expected, rel=1e-3)


UPDATES = {
    "one": lambda lora: None,
    "two": lambda lora: lora.add_adapter("b", LoraConfig(r=3, init="none")),
    "variants": lambda lora: lora.add_adapter("b", LoraConfig(r=3, init="none", variant="dora")),
}


@pytest.mark.parametrize("more", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("inputs", [6, 600], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_bit(more, inputs, dtype):
    lora = adapt(nn.Sequential(nn.Linear(inputs, 400)).to(dtype), "a", r=8)
    more(lora)
    lora.set_adapter(list(lora.adapters))
    other = copy.deepcopy(lora.model)
    expected = lora.merge_adapter(max_error=1)
    with torch.autocast("cpu"):
        report = LoraModel(other).merge_adapter(max_error=1)
    assert other[0].weight.dtype == dtype
    assert torch.equal(other[0].weight, lora.model[0].weight)
    assert report == expected
