"""Layers whose class is of others or changed by them: a subclass of the generated one, or of their own in a block."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from lora_plugins import LoraConfig, LoraModel

X = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COMPUTING = {"weight norm": weight_norm, "orthogonal": orthogonal}


class Negative(nn.Module):
    def forward(self, value):
        return -value


class SavedByAttribute(nn.Linear):
    """Saved as the linear layers of torch_geometric are: as what its attributes give."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in ("weight", "bias"):
            value = getattr(self, name)
            destination[prefix + name] = value if keep_vars else value.detach()


class Described(nn.Linear):
    """Puts what its attributes give into a state dict of its own."""

    def state_dict(self, *args, prefix="", **kwargs):
        return {**super().state_dict(*args, prefix=prefix, **kwargs), prefix + "weight": self.weight.detach()}


class WithExtraState(nn.Linear):
    """Puts what its attributes give beside its parameters, and takes it from there."""

    def get_extra_state(self):
        return self.weight.detach().clone()

    def set_extra_state(self, state):
        self.weight.data.copy_(state)


class Hooked(nn.Linear):
    """Has a hook that puts what its attributes give into a state dict."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_state_dict_post_hook(self.describe)

    @staticmethod
    def describe(layer, destination, prefix, metadata):
        destination[prefix + "weight"] = layer.weight.detach()


class HookedBefore(nn.Linear):
    """Has a hook that keeps what its attributes give in a buffer, ahead of a state dict."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros_like(self.weight))
        self.register_state_dict_pre_hook(self.look)

    @staticmethod
    def look(layer, prefix, keep_vars):
        layer.seen.copy_(layer.weight.detach())


class Pickled(nn.Linear):
    """Is pickled and copied as what its attributes give."""

    def __getstate__(self):
        return vars(self) | {"_parameters": {"weight": nn.Parameter(self.weight.detach()), "bias": self.bias}}


class CopiesItself(nn.Linear):
    """Makes its own copies, as the linear layers of earlier versions of torch_geometric do."""

    def __deepcopy__(self, memo):
        made = CopiesItself(self.in_features, self.out_features).to(self.weight)
        made.weight = nn.Parameter(self.weight.detach().clone())
        return made


def adapted(change=lambda model: model):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 5)).double().eval()
    nn.init.uniform_(model[1].weight)
    change(model)
    return LoraModel(model, LoraConfig(r=2, init="none"))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "tensor"), [(0, "bias"), (3, "bias"), (1, "weight")], ids=["convolution", "linear", "still norm"]
)
def test_other_tensors_are_computed_from_now_on(layer, tensor):
    lora = adapted()
    model = lora.model
    own = type(model[layer]).__bases__[0]
    with lora.disable_adapter() if tensor == "bias" else nullcontext():
        parametrize.register_parametrization(model[layer], tensor, Negative())
    expected = model(X)
    with lora.disable_adapter():
        base = model(X)
    assert_close(model(X), expected)
    assert_close(LoraModel(copy.deepcopy(model)).merge_and_unload()(X), expected)
    lora.add_adapter("other", LoraConfig(r=2))
    lora.set_adapter("other")
    assert_close(model(X), base)
    lora.unload()
    assert_close(model(X), base)
    assert type(model[layer]).__bases__ == (own,)
    parametrize.remove_parametrizations(model[layer], tensor)
    assert type(model[layer]) is own
    assert_close(model(X), base)


@pytest.mark.parametrize("compute", COMPUTING.values(), ids=COMPUTING)
def test_the_base_s_own_weight_is_computed_from_a_block_on(compute, tmp_path):
    lora, hand = adapted(), adapted(lambda model: compute(model[3]))
    with lora.disable_adapter() as model:
        compute(model[3])
        base = model(X)
    assert_close(model(X), hand.model(X))
    lora.save_adapter(tmp_path)
    assert_close(LoraModel.load_adapter(hand.unload(), tmp_path).model(X), model(X))
    lora.unload()
    assert_close(model(X), base)


def test_the_base_s_own_weight_is_not_computed_any_more_from_a_block_on():
    lora = adapted(lambda model: orthogonal(model[3]))
    expected = lora.model(X)
    with lora.disable_adapter() as model:
        parametrize.remove_parametrizations(model[3], "weight")
    assert_close(model(X), expected)
    assert type(lora.merge_and_unload()[3]) is nn.Linear
    assert_close(model(X), expected)


def test_what_was_computed_from_a_block_on_is_compiled():
    lora = adapted()
    with lora.disable_adapter() as model:
        weight_norm(model[3])
        parametrize.register_parametrization(model[0], "bias", Negative())
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))


@pytest.mark.parametrize("layer_class", [SavedByAttribute, Described, WithExtraState, Hooked, HookedBefore])
def test_state_dicts_hold_the_base_s_own_weight(layer_class):
    torch.manual_seed(0)
    layer = layer_class(8, 5).double()
    base = copy.deepcopy(layer.state_dict())
    lora = LoraModel(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], init="none"))
    expected = lora.model(X)
    saved = layer.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in base.items())
    layer.load_state_dict(saved)
    assert torch.equal(lora.model(X), expected)


@pytest.mark.parametrize("stored", [{}, {"quantize": "nf4", "quantize_options": {"min_size": 1}}], ids=["plain", "nf4"])
def test_a_layer_that_makes_its_own_copies_is_copied_with_its_adapter(stored):
    config = LoraConfig(r=2, target_modules=["0"], init="none", **stored)
    lora = LoraModel(nn.Sequential(CopiesItself(8, 5).double()), config)
    twin = LoraModel(copy.deepcopy(lora.model))
    assert torch.equal(twin.model(X), lora.model(X))
    for each in (twin, lora):
        each.unload(dequantize=bool(stored))
    assert torch.equal(twin.model(X), lora.model(X))
    assert not torch.equal(copy.deepcopy(lora.model)(X), lora.model(X))  # its own way again: it forgets the bias


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_layer_that_says_what_is_pickled_is_copied_with_its_own_weight(copied):
    lora = LoraModel(nn.Sequential(Pickled(8, 5).double()), LoraConfig(r=2, target_modules=["0"], init="none"))
    twin = LoraModel(copied(lora.model))
    assert torch.equal(twin.model(X), lora.model(X))
    assert torch.equal(twin.unload()(X), lora.unload()(X))
