"""Weights of adapted layers that are replaced or made anew past the model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lora_plugins import LoraConfig, LoraModel, StateError

LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), "weight"),
    "conv": (lambda: nn.Conv1d(4, 4, 1), "weight"),
    "embedding": (lambda: nn.Embedding(5, 4), "weight"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
}
RESETTING = {"linear": "reset_parameters", "attention": "_reset_parameters", "embedding": "reset_parameters"}


def adapted(name: str = "linear") -> LoraModel:
    torch.manual_seed(0)
    return LoraModel(nn.Sequential(LAYERS[name][0]()).double().eval(), LoraConfig(r=2, init="none"), "task")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [torch.zeros, None], ids=["parameter", "none"])
def test_a_weight_is_not_assigned_while_an_adapter_acts(name, value, untouched):
    lora, weight = adapted(name), LAYERS[name][1]
    new = value and nn.Parameter(value(getattr(lora.model[0], weight).shape, dtype=torch.float64))
    with untouched(lora.model), pytest.raises(StateError, match=rf"'{weight}' of '0' is .* the base and 'task' give"):
        setattr(lora.model[0], weight, new)


@pytest.mark.parametrize("name", RESETTING)
def test_a_weight_is_not_made_anew_while_an_adapter_acts(name, untouched):
    lora = adapted(name)
    with untouched(lora.model), pytest.raises(StateError, match=rf"made anew by {RESETTING[name]}\(\)"):
        getattr(lora.model[0], RESETTING[name])()


def test_the_base_s_own_is_assigned_in_a_block():
    lora = adapted()
    with lora.disable_adapter() as model:
        before = model[0].weight.detach().clone()
    update = lora.model[0].weight.detach() - before
    with lora.disable_adapter() as model:
        model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    torch.testing.assert_close(lora.model[0].weight, 1 + update, rtol=0, atol=1e-15)
    assert lora.unload()[0].weight.eq(1).all()


def test_other_attributes_are_assigned_as_ever():
    model = adapted().model
    model[0].bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    assert torch.equal(model(torch.zeros(1, 4, dtype=torch.float64)), torch.zeros(1, 4, dtype=torch.float64))


def test_a_base_is_loaded_by_assignment():
    lora, base = adapted(), {"0.weight": torch.ones(4, 4).double(), "0.bias": torch.ones(4).double()}
    lora.model.load_state_dict(base, assign=True)
    with lora.disable_adapter() as model:
        assert model(torch.ones(1, 4).double()).eq(5).all()
    assert lora.unload()[0].weight.eq(1).all()


def test_a_norm_is_not_fused_into_an_update_that_would_count_twice():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    model[1].running_var.fill_(3.0)
    lora = LoraModel(model, LoraConfig(r=2, init="none"))
    x = torch.randn(1, 3, 5, 5).double()
    with torch.no_grad(), pytest.raises(StateError, match="merge_and_unload"):
        fuse_conv_bn_eval(model[0], model[1])
    expected = model(x)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(fuse_conv_bn_eval(merged[0], merged[1])(x), expected, rtol=1e-12, atol=1e-12)


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": pytest.param(
        nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
    ),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_is_not_computed_from_one_that_has_updates_in_it(compute):
    model = adapted().model
    with pytest.raises(StateError, match=r"'weight' of '0' was taken away.*before it is adapted"):
        model(compute(model[0]).bias[None])
    with pytest.raises(StateError, match="taken away"):
        model(torch.zeros(1, 4).double())


def test_a_weight_is_not_pruned_while_an_adapter_acts(untouched):
    lora = adapted()
    with untouched(lora.model), pytest.raises(StateError, match=r"'weight' of '0' is .*Prune the base's own inside"):
        prune.l1_unstructured(lora.model[0], "weight", 0.5)


def test_the_base_s_own_is_pruned_in_a_block():
    lora, x = adapted(), torch.randn(3, 4).double()
    update = lora.model(x) - lora.model[0].bias
    with lora.disable_adapter() as model:
        update -= model(x) - model[0].bias
        prune.l1_unstructured(model[0], "weight", 0.5)
        expected = model(x) + update
    torch.testing.assert_close(lora.model(x), expected, rtol=0, atol=1e-14)
    assert lora.merge_and_unload()(x).sub(expected).abs().max() < 1e-14
