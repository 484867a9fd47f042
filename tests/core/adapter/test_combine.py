"""Weighted combination happens on the updates: exact where it can be, and never with cross terms."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, StateError
from tests.core.layer_cases import LAYER_CASES
from tests.core.libraries import of_library

LAYERS = [
    case for case in LAYER_CASES if case.id in ("linear", "transformers_conv1d", "embedding", "conv2d-std-timm")
] + [next(case for case in LAYER_CASES if case.id.startswith(prefix)) for prefix in ("conv1d", "conv3d", "conv_tr")]


def two_adapters(make=lambda: nn.Linear(6, 5), **fields) -> LoraModel:
    model = nn.ModuleDict({"layer": make().double()})
    lora = LoraModel(model, LoraConfig(r=2, alpha=3, init="none", **fields), "a")
    torch.manual_seed(7)
    lora.add_adapter("b", LoraConfig(r=3, alpha=7, init="none", use_rslora=True, **fields))
    return lora


def update_of(lora: LoraModel, name: str) -> Tensor:
    lora.set_adapter(name)
    weight = lora.model["layer"].weight.detach()
    with lora.disable_adapter():
        return weight - lora.model["layer"].weight.detach()


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
@pytest.mark.parametrize("kind", ["cat", "linear"])
@pytest.mark.parametrize("weights", [(0.7, -1.3), (1.0, 0.0)], ids=str)
def test_exact_sums(case, kind, weights):
    lora = two_adapters(case.make)
    expected = weights[0] * update_of(lora, "a") + weights[1] * update_of(lora, "b")
    error = lora.add_weighted_adapter(["a", "b"], weights, "c", kind)
    assert error < 1e-12
    torch.testing.assert_close(update_of(lora, "c"), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "svd"])
def test_no_rank_is_larger_than_that_of_the_weight(kind):
    lora = two_adapters(lambda: nn.Linear(9, 3))
    expected = update_of(lora, "a") + update_of(lora, "b")
    assert lora.add_weighted_adapter(["a", "b"], [1, 1], "c", kind, **({"rank": 5} if kind == "svd" else {})) < 1e-12
    assert lora.plans["c"].layers[0].r == 3
    torch.testing.assert_close(update_of(lora, "c"), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_weight_one_is_the_identity_and_opposites_cancel(kind):
    lora = two_adapters()
    lora.add_weighted_adapter(["a"], [1.0], "same", kind)
    torch.testing.assert_close(update_of(lora, "same"), update_of(lora, "a"), rtol=1e-12, atol=1e-13)
    assert lora.add_weighted_adapter(["a", "a"], [1.0, -1.0], "none", kind) == 0
    assert not update_of(lora, "none").any()


def test_svd_is_the_best_approximation_and_says_its_error():
    lora = two_adapters()
    exact = update_of(lora, "a") + update_of(lora, "b")
    error = lora.add_weighted_adapter(["a", "b"], [1, 1], "c", "svd", rank=2)
    values = torch.linalg.svdvals(exact)
    assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-9)
    assert torch.linalg.matrix_rank(update_of(lora, "c")) == 2


PEFT = {
    kind: of_library("peft.utils.merge_utils", kind) for kind in ("magnitude_prune", "ties", "dare_linear", "dare_ties")
}


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")  # of PEFT
@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
def test_pruned_combinations_equal_those_of_peft(kind, density):
    lora = two_adapters()
    updates = [update_of(lora, "a"), update_of(lora, "b")]
    torch.manual_seed(11)
    expected = PEFT[kind](updates, torch.tensor([0.6, 0.9], dtype=torch.float64), density)
    torch.manual_seed(11)
    error = lora.add_weighted_adapter(["a", "b"], [0.6, 0.9], "c", kind, density=density)
    assert error < 1e-12  # the sum of the ranks, 5, is the full rank of this layer
    torch.testing.assert_close(update_of(lora, "c"), expected, rtol=1e-9, atol=1e-12)


def test_of_updates_that_cancel_ties_takes_what_is_positive():
    layer = nn.Linear(6, 5).double()
    lora = LoraModel(nn.ModuleDict({"layer": layer}), LoraConfig(r=2, init="none"), "a")
    lora.add_adapter("opposite", LoraConfig(r=2))
    with torch.no_grad():
        layer.lora_A["opposite"].copy_(layer.lora_A["a"])
        layer.lora_B["opposite"].copy_(-layer.lora_B["a"])
    lora.add_weighted_adapter(["a", "opposite"], [1.0, 1.0], "c", "ties", density=1.0, rank=5)
    torch.testing.assert_close(update_of(lora, "c"), update_of(lora, "a").abs(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_each_layer_drops_elements_of_its_own(kind):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5)).double()
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    first, second = model
    with torch.no_grad():
        second.lora_A["a"].copy_(first.lora_A["a"])
        second.lora_B["a"].copy_(first.lora_B["a"])
    lora.add_weighted_adapter(["a"], [1.0], "c", kind, density=0.5, rank=5)
    lora.set_adapter("c")
    kept = [(layer.weight - layer._parameters["weight"]).abs() > 1e-9 for layer in model]
    assert not torch.equal(*kept)


def test_adapters_on_different_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    lora = LoraModel(model, LoraConfig(r=2, init="none", target_modules=["0"]), "a")
    lora.add_adapter("b", LoraConfig(r=3, init="none", target_modules=["1"]))
    lora.set_adapter(["a", "b"])
    x = torch.randn(3, 4).double()
    expected = model(x)
    lora.add_weighted_adapter(["a", "b"], [1, 1], "c")
    lora.set_adapter("c")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_parts_of_a_fused_layer_and_attention():
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "attention": nn.MultiheadAttention(4, 2)}).double()
    fields = {"init": "none", "fused_parts": {"qkv": ["q", "v"]}}
    lora = LoraModel(model, LoraConfig(r=1, **fields), "a")
    lora.add_adapter("b", LoraConfig(r=2, **fields))
    lora.set_adapter(["a", "b"])
    expected = [model["qkv"].weight.detach(), model["attention"].in_proj_weight.detach()]
    lora.add_weighted_adapter(["a", "b"], [1, 1], "c")
    lora.set_adapter("c")
    for got, wanted in zip([model["qkv"].weight, model["attention"].in_proj_weight], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_heads_and_biases_are_combined_as_differences():
    model = nn.ModuleDict({"layer": nn.Linear(6, 5), "head": nn.Linear(5, 2)})
    base = copy.deepcopy(model.state_dict())
    fields = {"target_modules": ["layer"], "modules_to_save": ["head"], "bias": "lora_only", "init": "none"}
    lora = LoraModel(model, LoraConfig(**fields), "a")
    lora.add_adapter("b", LoraConfig(**fields))
    moved = {}
    for name in ("a", "b"):
        lora.set_adapter(name)
        with torch.no_grad():
            for key in ("head.weight", "layer.bias"):
                model.get_parameter(key).add_(torch.randn_like(model.get_parameter(key)))
                moved[name, key] = model.get_parameter(key).detach().clone()
    lora.add_weighted_adapter(["a"], [1.0], "same")
    lora.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mix")
    for key in ("head.weight", "layer.bias"):
        lora.set_adapter("same")
        assert torch.equal(model.get_parameter(key), moved["a", key])
        lora.set_adapter("mix")
        expected = base[key] + 0.5 * (moved["a", key] - base[key]) + 2 * (moved["b", key] - base[key])
        torch.testing.assert_close(model.get_parameter(key).detach(), expected)


@pytest.mark.parametrize(
    "copied",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), nn.Module.double],
    ids=["itself", "deepcopy", "pickle", "cast"],
)
def test_the_base_of_the_differences_is_what_is_there(copied):
    model = nn.Sequential(nn.Linear(3, 3))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]), "plain")
    LoraModel(model).add_adapter("a", LoraConfig(r=2, target_modules=["0"], bias="all"))
    LoraModel(model).set_adapter("a")
    with torch.no_grad():
        own = model[0].bias.add_(1).clone()
    LoraModel(model).set_adapter("plain")
    model = copied(model)  # while the base's bias is in place
    model.load_state_dict(nn.Sequential(nn.Linear(3, 3)).to(model[0].bias.dtype).state_dict())
    base = model[0].bias.detach().clone()
    lora = LoraModel(model)
    lora.add_weighted_adapter(["a", "plain"], [2.0, 1.0], "mix")
    lora.set_adapter("mix")
    torch.testing.assert_close(model[0].bias.detach(), base + 2 * (own.to(base.dtype) - base))


def test_saves_and_loads(tmp_path):
    lora = two_adapters()
    base = nn.ModuleDict({"layer": nn.Linear(6, 5).double()})
    with lora.disable_adapter():
        base["layer"].load_state_dict({k: v for k, v in lora.model["layer"].state_dict().items() if "lora" not in k})
    lora.add_weighted_adapter(["a", "b"], [0.3, 0.4], "c", "cat")
    lora.save_adapter(tmp_path, "c")
    lora.set_adapter("c")
    LoraModel.load_adapter(base, tmp_path)
    assert torch.equal(base["layer"].weight, lora.model["layer"].weight)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((["a", "b"], [1], "c"), {}, ConfigError, "2 adapters and 1 weight:"),
        ((["a", "x"], [1, 1], "c"), {}, StateError, "no adapter 'x'"),
        ((["a"], [1], "b"), {}, ConfigError, "has an adapter 'b' already"),
        ((["a"], [1], "c", "tie"), {}, ConfigError, "Did you mean 'ties'"),
        ((["a"], [1], "c", "cat"), {"density": 1}, ConfigError, "no option 'density'"),
        ((["a"], [1], "c", "ties"), {}, ConfigError, "needs a density"),
        ((["a"], [1], "c", "svd"), {"rank": 0}, ConfigError, "rank is a whole number"),
    ],
    ids=["lengths", "unknown", "taken", "kind", "option", "density", "rank"],
)
def test_refuses(arguments, options, error, message):
    lora = two_adapters()
    with pytest.raises(error, match=message):
        lora.add_weighted_adapter(*arguments, **options)
    assert list(lora.adapters) == ["a", "b"]


def test_an_adapter_with_a_base_of_its_own_is_refused():
    lora = two_adapters()
    lora.add_adapter("own", LoraConfig(r=2, init="pissa"))
    with pytest.raises(StateError, match=r"'own' has a base of its own \(pissa\); it cannot be combined"):
        lora.add_weighted_adapter(["a", "own"], [1.0, 1.0], "c")
    assert list(lora.adapters) == ["a", "b", "own"]


def test_heads_of_others_are_none_of_the_combination():
    model = nn.ModuleDict({"layer": nn.Linear(6, 5), "head": nn.Linear(5, 2)})
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["layer"]), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"]))
    lora.add_weighted_adapter(["a"], [2.0], "c")
    assert lora.plans["c"].trained == ()


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
@pytest.mark.parametrize("weight", [math.nan, -math.inf, None, "2", True, 10**400, [1.0]], ids=repr)
def test_a_weight_that_is_no_finite_number_is_named(weight, kind):
    lora = two_adapters()
    with pytest.raises(ConfigError, match=r"The weight of 'b' is .* has to be a finite number"):
        lora.add_weighted_adapter(["a", "b"], [1.0, weight], "c", kind)
    assert list(lora.adapters) == ["a", "b"]


@pytest.mark.parametrize("options", [{"rank": 1.5}, {"rank": math.inf}, {"rank": "two"}, {"rank": None}], ids=str)
def test_a_rank_that_is_none_is_refused(options):
    with pytest.raises(ConfigError, match="rank is"):
        two_adapters().add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "svd", **options)


@pytest.mark.parametrize(
    ("kind", "options"), [("cat", {}), ("linear", {}), ("svd", {}), ("ties", {"density": 0.5})], ids=str
)
@pytest.mark.parametrize("weight", [1e300, 1.7e308], ids=["of single precision", "of any"])
def test_a_combination_beyond_the_range_of_the_factors_is_refused(weight, kind, options):
    lora = two_adapters(lambda: nn.Linear(6, 5))
    lora.model.float()
    with torch.no_grad():
        lora.model["layer"].lora_A["a"].fill_(100)
    with pytest.raises(ConfigError, match=r"combination of 'layer' has values that are not finite in torch.float32"):
        lora.add_weighted_adapter(["a", "b"], [weight, 1.0], "c", kind, **options)
    assert list(lora.adapters) == ["a", "b"]


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]], ids=str)
def test_a_layer_that_one_adapter_trains_in_full_and_another_adapts_is_named(order):
    model = nn.ModuleDict({"stem": nn.Linear(3, 3), "head": nn.Sequential(nn.Linear(3, 2))})
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["stem", "head.0"], init="none"), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["stem"], modules_to_save=["head"], init="none"))
    with pytest.raises(ConfigError, match=r"adapts 'head\.0', and another one trains it in full"):
        lora.add_weighted_adapter(order, [1.0, 1.0], "both")
    lora.set_adapter(order)  # as the message says


@pytest.mark.parametrize("name", ["a+b", "a(b)", "x$", "a|b", "[a]", "a-b", "^a", "a\\b"])
def test_layers_of_any_name_combine(name):
    """A name is no regular expression, whatever characters it has."""
    model = nn.ModuleDict({name: nn.Linear(4, 3), "other": nn.Linear(4, 3)}).double()
    lora = LoraModel(model, LoraConfig(r=1, init="none"), "first")
    lora.add_adapter("second", LoraConfig(r=2, init="none"))
    lora.add_weighted_adapter(["first", "second"], [0.5, 2.0], "both")
    expected = {layer: 0.5 * update(lora, "first", layer) + 2 * update(lora, "second", layer) for layer in model}
    assert {layer.name: layer.r for layer in lora.plans["both"].layers} == {name: 3, "other": 3}
    for layer, delta in expected.items():
        torch.testing.assert_close(update(lora, "both", layer), delta)


def update(lora, adapter, layer):
    """`ΔW` of one adapter, from its state dict."""
    A, B = (lora.model[layer].get_submodule(f"lora_{factor}")[adapter] for factor in "AB")
    return next(planned for planned in lora.plans[adapter].layers if planned.name == layer).scaling * B @ A


def test_a_variance_is_never_less_than_0():
    """Weights that are right for updates can make one of a norm's statistics; found by random calls."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fields = {"target_modules": ["0"], "norm": "track"}
    lora = LoraModel(model, LoraConfig(r=2, **fields), "a")
    lora.add_adapter("b", LoraConfig(r=2, **fields))
    for name, scale in (("a", 0.1), ("b", 3.0)):
        lora.set_adapter(name)
        for _ in range(20):
            model.train()(scale * torch.randn(64, 4))
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"'1.running_var' is less than 0 in places"):
        lora.add_weighted_adapter(["a", "b"], [1.0, -1.0], "c")
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []
    lora.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    lora.set_adapter("c")
    assert model(torch.randn(3, 4)).isfinite().all()
