"""Merging writes what the law says, loses nothing in silence, and is taken back bit for bit."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, MergeError, MergeReport, StateError
from tests.core.libraries import Conv1D

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 4)).to(dtype)


def adapt(model: nn.Module, name: str = "default", **fields) -> LoraModel:
    return LoraModel(model, LoraConfig(**{"r": 2, "init": "none", **fields}), name)


@NARROW
def test_twenty_rounds_restore_every_bit(dtype):
    model = model_of(dtype)
    lora = adapt(model, alpha=16)
    before = copy.deepcopy(model.state_dict())
    for _ in range(20):
        lora.merge_adapter(max_error=1)
        assert not torch.equal(model[0].weight.float(), before["0.weight"].float())
        lora.unmerge_adapter()
        assert all(torch.equal(value.float(), before[key].float()) for key, value in model.state_dict().items())


@NARROW
def test_rounds_once_from_float32(dtype):
    model = model_of(dtype)
    lora = adapt(model)
    weight = model[2]._parameters["weight"].detach()
    A, B = model[2].lora_A["default"], model[2].lora_B["default"]
    expected = (weight.double() + (8 / 2) * B.double() @ A.double()).to(dtype)
    lora.merge_adapter(max_error=1)
    # One unit in the last place where the sum in float32 rounds to the other side of a tie.
    assert (model[2].weight != expected).float().mean() < 1e-2
    assert model[2].weight.dtype == dtype
    torch.testing.assert_close(model[2].weight.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=0)


@NARROW
def test_a_tiny_update_is_refused_and_nothing_changes(dtype):
    model = model_of(dtype)
    lora = adapt(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B["default"].mul_(1e-4)
    before = copy.deepcopy(model.state_dict())
    for merge in (lora.merge_adapter, lora.merge_and_unload):
        with pytest.raises(MergeError, match=rf"would lose \d+% of the update of '\d\.weight' \({dtype}\)"):
            merge()
        assert all(torch.equal(value.float(), before[key].float()) for key, value in model.state_dict().items())
        assert lora.merged_adapters == ()
    report = lora.merge_adapter(max_error=1)
    assert report.worst > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-20, 1e-8], ids=["tiny", "small"])
def test_an_update_that_is_next_to_nothing_is_no_loss(dtype, scale):
    """As after steps at a learning rate of next to nothing, in every type."""
    model = model_of(dtype)
    lora = adapt(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B["default"].mul_(scale)
    lora.merge_adapter()
    lora.unmerge_adapter()
    lora.merge_and_unload()


def test_an_update_below_what_float16_tells_from_zero_is_refused():
    """Its elements, of 1e-9 at most, are lost, though they are as large as those of the weight."""
    model = nn.Sequential(nn.Linear(16, 16)).half()
    nn.init.zeros_(model[0].weight)
    lora = adapt(model)
    with torch.no_grad():
        model[0].lora_B["default"].mul_(1e-9)
    with pytest.raises(MergeError, match="would lose 100%"):
        lora.merge_adapter()


@pytest.mark.parametrize(("base", "refused"), [(1e4, False), (1.0, True)], ids=["large", "small"])
def test_what_is_next_to_nothing_is_told_by_the_weight(base, refused):
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16)
    nn.init.constant_(model[0].weight, base)
    lora = adapt(model)
    with torch.no_grad():
        model[0].lora_B["default"].mul_(1e-4)
    with pytest.raises(MergeError, match="would lose 100%") if refused else nullcontext():
        lora.merge_adapter()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_advice_fits_the_type(dtype):
    with pytest.raises(MergeError, match="max_error") as error:
        adapt(model_of(dtype)).merge_adapter(max_error=1e-12)
    assert ("model.float()" in str(error.value)) == (dtype is not torch.float32)


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


def test_a_partial_merge_of_computed_weights_is_gone_on_with():
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(4, size)) for size in (4, 3)]
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 4).double()
    lora = adapt(model, "a")
    lora.add_adapter("b", LoraConfig(r=3, init="none"))
    lora.set_adapter(["a", "b"])
    expected = model(x)
    for name in ("a", "b"):
        lora.merge_adapter(name)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-12, atol=1e-12)


def test_merging_one_that_does_not_act_is_refused():
    lora = adapt(model_of(), "a")
    lora.add_adapter("waits", LoraConfig(r=2))
    with pytest.raises(StateError, match=r"'waits' is not active. Call set_adapter\('waits'\) first"):
        lora.merge_adapter("waits")


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
        with pytest.raises(MergeError, match=r"'embed\.weight' is .* as 'head\.weight'.* 'embed' to exclude_modules"):
            merge()
    with pytest.raises(MergeError, match=r"'embed\.weight' is the same tensor as 'head\.weight'"):
        lora.add_adapter("q", LoraConfig(target_modules=["embed"], init="loftq"))
    assert list(lora.adapters) == ["default"]


def test_memory_format_survives():
    model = model_of().to(memory_format=torch.channels_last)
    adapt(model).merge_and_unload()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_values_that_are_not_finite_are_refused():
    model = model_of()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"'2\.weight': the weight or its update has values that are not finite"):
        adapt(model).merge_and_unload(max_error=float("inf"))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_sums_that_half_precision_cannot_hold_are_refused(merge):
    model = nn.Sequential(nn.Linear(4, 4)).half()
    lora = adapt(model)
    model[0].lora_A["default"].data.fill_(1)
    model[0].lora_B["default"].data.fill_(1e5)  # a float32, whose rounding error alone would be small
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MergeError, match=r"'0\.weight': the weight or its update .* too large for the type"):
        getattr(lora, merge)(max_error=float("inf"))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


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


def test_a_merge_of_nothing_says_so():
    lora = adapt(model_of())
    assert str(lora.merge_adapter()).startswith("merged 'default' into 2 weights")
    assert str(lora.merge_adapter()).startswith("merged nothing")


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


@pytest.mark.parametrize("size", [1, 30], ids=["", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_right_where_the_factors_nearly_cancel(dtype, size):
    model = nn.Sequential(nn.Linear(64, 48))
    with torch.no_grad():
        model[0].weight.mul_(size**2)
    lora = adapt(model, alpha=2)
    for factor in (model[0].lora_A, model[0].lora_B):
        factor.to(dtype)
    A, B = model[0].lora_A["default"], model[0].lora_B["default"]
    with torch.no_grad():
        A[1] = -A[0] + (1e-3 if dtype == torch.float32 else 1e-1) * A[1]
        B[:, 1] = B[:, 0]
        A.mul_(size)
        B.mul_(size)
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


@HALF
def test_an_error_that_counts_is_measured(dtype):
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    lora = adapt(model)
    with torch.no_grad():
        model[0].lora_B["default"].mul_(0.02)
    before = model[0]._parameters["weight"].detach().double()
    delta = 4 * (model[0].lora_B["default"].double() @ model[0].lora_A["default"].double()).detach()
    (found,) = lora.merge_adapter(max_error=1).weights
    lost = (model[0].weight.detach().double() - before - delta).norm() / delta.norm()
    assert lost > 2e-3
    assert found.relative_error == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_weight_lies_in_memory_as_it_did(merge):
    layers = [nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)]
    layers[2].weight = nn.Parameter(torch.randn(6, 5).T)
    model = nn.Sequential(*layers)
    strides = [layer.weight.stride() for layer in layers]
    lora = adapt(model)
    expected = [layer.weight.detach() for layer in layers]
    getattr(lora, merge)()
    assert [layer.weight.stride() for layer in layers] == strides
    assert all(torch.allclose(layer.weight, weight) for layer, weight in zip(layers, expected, strict=True))


def test_a_fresh_adapter_loses_nothing():
    report = adapt(model_of(), init="gaussian").merge_adapter()
    assert [weight.relative_error for weight in report.weights] == [0, 0]
    assert report.worst == 0
    assert MergeReport((), ()).worst == 0


@pytest.mark.parametrize("base", [0.0, 1.0], ids=["zero", "ones"])
def test_an_error_that_is_surely_small_is_bounded(base):
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.constant_(model[0].weight, base)
    weight = model[0].weight.detach()
    lora = adapt(model)
    update = (model[0].weight - weight).detach()
    (found,) = lora.merge_adapter().weights
    bound = torch.finfo(torch.float32).eps / 2 * float((weight.norm() + update.norm()) / update.norm())
    assert found.relative_error == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize(("scale", "refused"), [(0.3, False), (0.003, True)])
def test_a_tenth_may_be_lost(scale, refused):
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    lora = adapt(model)
    with torch.no_grad():
        model[0].lora_B["default"].mul_(scale)
    lost = lora.merge_adapter(max_error=10).worst
    assert (0.2 < lost < 0.9) if refused else (0.001 < lost < 0.1)
    lora.unmerge_adapter()
    for merge in (lora.merge_adapter, lora.merge_and_unload):
        if refused:
            with pytest.raises(MergeError, match=rf"would lose {lost:.0%} of the update"):
                merge()
    if not refused:
        lora.merge_adapter()
