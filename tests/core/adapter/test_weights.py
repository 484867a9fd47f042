"""Active adapters with weights: the same as a model whose update is the weighted sum, in whatever is done with it."""

import copy

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, StateError
from lora_plugins.errors import counted
from tests.core.layers.test_types import CASES

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHTS = {"a": 0.7, "b": -0.4}


def model(**fields) -> LoraModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    lora = LoraModel(net, LoraConfig(r=2, alpha=3, init="gaussian", target_modules=["0", "2"], **fields), "a")
    lora.add_adapter("b", LoraConfig(r=1, init="gaussian", target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return lora


def delta(lora: LoraModel, layer: str, adapter: str) -> torch.Tensor:
    """What an adapter adds to a weight, alone and at weight 1."""
    alone = copy.deepcopy(lora.model)
    LoraModel(alone).set_adapter(adapter)
    return (
        alone.get_submodule(layer).weight - dict(LoraModel(alone).unload().named_parameters())[f"{layer}.weight"]
    ).detach()


def expected(lora: LoraModel) -> nn.Module:
    plain = copy.deepcopy(lora.model)
    LoraModel(plain).unload()
    with torch.no_grad():
        for layer, adapters in {"0": "ab", "2": "a"}.items():
            for adapter in adapters:
                plain.get_submodule(layer).weight += WEIGHTS[adapter] * delta(lora, layer, adapter)
    return plain


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_forward_and_merging(variant):
    lora = model(variant=variant)
    wanted = expected(lora)(X)
    lora.set_adapter(["a", "b"], weights=[*WEIGHTS.values()])
    assert lora.active_weights == WEIGHTS
    close(lora.model(X), wanted)
    lora.merge_adapter()
    close(lora.model(X), wanted)
    lora.unmerge_adapter()
    close(lora.model(X), wanted)
    close(copy.deepcopy(lora.model)(X), wanted)
    close(lora.merge_and_unload()(X), wanted)


def test_gradients():
    lora = model()
    lora.set_adapter("a", weights=[0.25])
    found = torch.autograd.grad(lora.model(X).sum(), [p for p in lora.model.parameters() if p.requires_grad])
    other = model()
    for name, parameter in other.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.25)
    other.set_adapter("a")
    wanted = torch.autograd.grad(other.model(X).sum(), [p for p in other.model.parameters() if p.requires_grad])
    for at, (one, two) in enumerate(zip(found, wanted, strict=True)):
        close(one, two * 0.25 if at % 2 else two)  # of A, then of B


@pytest.mark.parametrize("name", CASES)
def test_every_layer_type(name):
    torch.manual_seed(0)
    net = nn.Sequential(CASES[name].make()).double().eval()
    inputs = CASES[name].inputs()
    lora = LoraModel(net, LoraConfig(r=2, alpha=4, init="gaussian"), "a")
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 4)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            if "lora_B" in key:
                parameter.mul_(0.5)
    lora.set_adapter("a", weights=[0.5])
    close(net(*inputs), twin(*inputs))
    close(lora.merge_and_unload()(*inputs), twin(*inputs))


def test_blocks_have_adapters_as_they_are_and_give_the_weights_back():
    lora = model()
    alone = lora.model(X)
    lora.set_adapter(["a", "b"], weights=[*WEIGHTS.values()])
    weighted = lora.model(X)
    with lora.mixed_batch(["a"] * 5):
        close(lora.model(X), alone)
    assert torch.equal(lora.model(X), weighted)
    assert lora.active_weights == WEIGHTS


def test_weights_end_with_the_next_choice_and_with_the_adapter():
    lora = model()
    alone = lora.model(X)
    lora.set_adapter(["a", "b"], weights=[1, 0.5])
    lora.delete_adapter("b")
    assert torch.equal(lora.model(X), alone)
    lora.set_adapter("a", weights=[0.5])
    lora.set_adapter("a")
    assert torch.equal(lora.model(X), alone)


def test_an_adapter_is_saved_without_its_weight(tmp_path):
    lora = model()
    alone = lora.model(X)
    lora.set_adapter("a", weights=[0.5])
    lora.save_adapter(tmp_path / "a")
    base = copy.deepcopy(lora.model)
    close(LoraModel.load_adapter(LoraModel(base).unload(), tmp_path / "a").model(X), alone)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        *(([1.0] * count, f"2 adapters and {counted(count, 'weight')}: give one") for count in (0, 1, 3)),
        *(([0.5, wrong], "weight of 'b' is .* finite") for wrong in (float("nan"), float("inf"), "2", None, True)),
        ([10**5000, 1], "weight of 'a' is .*(16610 bits|5001 digits)"),
    ],
    ids=["none", "one", "three", "nan", "inf", "text", "nothing", "flag", "too large"],
)
def test_other_weights_are_refused(weights, message):
    lora = model()
    before = lora.model(X)
    with pytest.raises(ConfigError, match=message):
        lora.set_adapter(["a", "b"], weights=weights)
    assert torch.equal(lora.model(X), before)


@pytest.mark.parametrize("fields", [{"bias": "lora_only"}, {"init": "pissa"}], ids=["bias", "changed-base"])
def test_an_adapter_with_values_of_its_own_has_no_weight(fields):
    net = nn.Sequential(nn.Linear(4, 6)).double()
    lora = LoraModel(net, LoraConfig(r=2, **fields), "a")
    lora.set_adapter("a", weights=[1.0])
    with pytest.raises(StateError, match=r"'a' has its own value of '0.*, which cannot be weighted"):
        lora.set_adapter("a", weights=[0.5])
