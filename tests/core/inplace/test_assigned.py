"""Weights of adapted layers that are replaced or made anew past the model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

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


def test_a_weight_is_not_made_anew_by_a_method_with_arguments(untouched):
    class Scaled(nn.Linear):
        def reset_parameters(self, gain=1.0):
            nn.init.orthogonal_(self.weight, gain)

    model = nn.Sequential(Scaled(4, 4))
    LoraModel(model, LoraConfig(r=2, init="none"))
    with untouched(model), pytest.raises(StateError, match=r"made anew by reset_parameters\(\)"):
        model[0].reset_parameters(gain=0.1)


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


def test_a_buffer_joins_an_adapted_layer():
    model = adapted().model
    model[0].register_buffer("mask", torch.ones(2), persistent=False)
    assert dict(model.named_buffers())["0.mask"].eq(1).all()
    assert "0.mask" not in model.state_dict()


def test_a_weight_that_a_hook_computes_is_not_made_anew_while_an_adapter_is_merged(untouched):
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4).double())).eval()
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "task")
    lora.merge_adapter()
    with untouched(model), pytest.raises(StateError, match="'weight' of '0' is what the base and 'task' give together"):
        model[0].reset_parameters()


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


@pytest.mark.parametrize(
    "compute", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight norm", "spectral norm"]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_a_weight_is_not_computed_by_a_hook_from_now_on(compute):
    model = adapted().model
    with pytest.raises(StateError, match=r"'weight' of '0' was taken away.*before it is adapted"):
        compute(model[0])
    with pytest.raises(StateError, match="taken away"):
        model(torch.zeros(1, 4).double())


PARAMETRIZATIONS = {"weight norm": parametrizations.weight_norm, "orthogonal": parametrizations.orthogonal}


@pytest.mark.parametrize("parametrized", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
class TestParametrizations:
    @pytest.fixture
    def lora(self, parametrized):
        torch.manual_seed(0)
        model = nn.Sequential(parametrized(nn.Linear(4, 4))).double()
        return LoraModel(model, LoraConfig(r=2, init="none"), "task")

    def test_none_is_registered_while_an_adapter_acts(self, parametrized, untouched):
        lora = adapted()
        with untouched(lora.model), pytest.raises(StateError, match=r"'weight' of '0'.*register_parametrization\("):
            parametrized(lora.model[0])

    def test_no_second_one_is_registered_while_an_adapter_acts(self, lora, parametrized, untouched):
        with untouched(lora.model), pytest.raises(StateError, match="changed by register_parametrization"):
            register_parametrization(lora.model[0], "weight", nn.Softplus())

    @pytest.mark.parametrize("leave", [True, False])
    def test_none_is_removed_while_an_adapter_acts(self, lora, leave, untouched):
        with untouched(lora.model), pytest.raises(StateError, match=r"by remove_parametrizations\(\).*disable_adapter"):
            remove_parametrizations(lora.model[0], "weight", leave_parametrized=leave)

    def test_nothing_is_assigned_through_one_while_an_adapter_acts(self, lora, untouched):
        with untouched(lora.model), pytest.raises(StateError, match=r"'weight' of '0' .* cannot be assigned"):
            lora.model[0].weight = torch.eye(4).double()

    def test_the_base_s_own_is_assigned_through_one_in_a_block(self, lora):
        with lora.disable_adapter() as model:
            model[0].weight = torch.eye(4).double()
        assert lora.unload()[0].weight.sub(torch.eye(4)).abs().max() < 1e-14


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


REMOVED = {
    "pruning": (prune.identity, prune.remove),
    "weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.parametrize(("put_on", "remove"), REMOVED.values(), ids=REMOVED)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_no_hook_is_removed_while_an_adapter_is_merged(put_on, remove, untouched):
    model = nn.Sequential(nn.Linear(4, 4)).double().eval()
    put_on(model[0], "weight")
    lora, x = LoraModel(model, LoraConfig(r=2, init="none"), "task"), torch.randn(3, 4).double()
    expected = model(x)
    lora.merge_adapter()
    with untouched(model), pytest.raises(StateError, match=r"'weight' of '0'.*unmerge_adapter\(\) first"):
        remove(model[0], "weight")
    lora.unmerge_adapter()
    remove(model[0], "weight")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    assert list(lora.unload()[0]._parameters) == ["bias", "weight"]
