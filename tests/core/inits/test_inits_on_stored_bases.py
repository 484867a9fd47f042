"""Inits that change the base, where the base is really stored: LoftQ's codes are what is stored."""

import copy

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from lora_plugins.plugins import STORAGES as KIND
from lora_plugins.plugins import build_registry, storage_options
from lora_plugins.utils import low_rank
from tests.slow import thinned

LAYERS = {
    "linear": lambda: nn.Linear(96, 64),
    "conv2d": lambda: nn.Conv2d(12, 64, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(64, 12, 3),
    "embedding": lambda: nn.Embedding(64, 96),
    "attention": lambda: nn.MultiheadAttention(32, 4),
}
STORAGES = {
    "nf4": ("nf4", {}),
    "nf4-single": ("nf4", {"double_quant": False}),
    "int8": ("int8", {}),
    "nf4-large-blocks": ("nf4", {"block_size": 512}),
}


def weight_of(layer):
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


def started(kind, storage, **fields):
    """The untouched weight, and the layer of a model that was adapted."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": LAYERS[kind]()})
    original = weight_of(model["layer"]).detach().clone()
    name, options = STORAGES[storage]
    lora = LoraModel(
        model,
        LoraConfig(
            **{"target_modules": ["layer"], "quantize": name, "quantize_options": {"min_size": 0, **options}, **fields}
        ),
    )
    return lora, original


def error(lora, original):
    return float((weight_of(lora.model["layer"]).detach() - original).norm())


def base_of(lora):
    with lora.disable_adapter():
        return weight_of(lora.model["layer"]).clone()


@thinned(3, kind=[*LAYERS], storage=[*STORAGES], r=[1, 4, 16], iterations=[1, 2, 5])
def test_loftq_is_at_least_as_near_as_plain_quantization(kind, storage, r, iterations):
    lora, original = started(kind, storage, init="loftq", r=r, alpha=3.0, init_options={"iterations": iterations})
    plain, _ = started(kind, storage, r=r)
    assert error(lora, original) <= error(plain, original)
    more, _ = started(kind, storage, init="loftq", r=r, alpha=3.0, init_options={"iterations": iterations + 1})
    assert error(more, original) <= error(lora, original) * (1 + 1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("iterations", [1, 4])
def test_the_stored_codes_are_loftqs_own(storage, iterations):
    """Algorithm 1 of the paper, written out with the storage as its quantizer."""
    lora, original = started("linear", storage, init="loftq", r=8, alpha=8.0, init_options={"iterations": iterations})
    name, given = STORAGES[storage]
    plugin = build_registry().get(KIND, name)
    options = storage_options(plugin, given)
    update, best = torch.zeros_like(original), float("inf")
    for _ in range(iterations):
        stored = plugin.store(original - update, options)
        dense = plugin.restore(stored, original.shape, options)
        A, B = low_rank(original - dense, 8, 1.0)
        update = B @ A
        if (now := float((original - dense - update).norm())) < best:
            best, codes = now, stored["codes"]
    got = lora.model["layer"].weight_stored.codes
    # The iterates before are products of float32, which the recipe takes out in float64.
    assert (got != codes).float().mean() < 1e-3
    assert error(lora, original) == pytest.approx(best, rel=1e-3)
    if iterations == 1:
        assert torch.equal(got, codes)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_changed_base_of_others_is_stored(init):
    lora, original = started("linear", "nf4-single", init=init, r=8)
    layer = lora.model["layer"]
    float_model = nn.ModuleDict({"layer": nn.Linear(96, 64)})
    float_model["layer"].weight.data.copy_(original)
    float_lora = LoraModel(float_model, LoraConfig(target_modules=["layer"], init=init, r=8))
    with float_lora.disable_adapter():
        pass
    plugin = build_registry().get(KIND, "nf4")
    options = storage_options(plugin, {"double_quant": False})
    expected = plugin.restore(
        plugin.store(float_model["layer"]._parameters["weight"].detach(), options), original.shape, options
    )
    assert torch.equal(base_of(lora), expected)
    assert torch.equal(layer.lora_A["default"], float_model["layer"].lora_A["default"])


def test_parts_of_a_fused_weight():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 96)})
    original = model["layer"].weight.detach().clone()
    config = LoraConfig(
        r=4, fused_parts={"layer": ["q", "v"]}, init="loftq", quantize="nf4", quantize_options={"min_size": 0}
    )
    LoraModel(model, config)
    dense = model["layer"].weight_stored.dense()
    plugin = build_registry().get(KIND, "nf4")
    options = storage_options(plugin, {"double_quant": True})
    plain = plugin.restore(plugin.store(original, options), original.shape, options)
    assert torch.equal(dense[32:64], plain[32:64])
    for rows in (slice(0, 32), slice(64, 96)):
        now = (model["layer"].weight[rows] - original[rows]).norm()
        assert now < (plain[rows] - original[rows]).norm()


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora", "lora_ga"])
def test_on_a_base_that_is_stored_already_they_are_refused(init, untouched):
    lora, _ = started("linear", "nf4")
    model = lora.unload(dequantize=False)
    with untouched(model), pytest.raises(TargetError, match=rf"stored as nf4 already, so the init '{init}' cannot"):
        LoraModel(model, LoraConfig(init=init))


def test_options_that_the_storage_decides_are_refused():
    with pytest.raises(ConfigError, match="'bits', 'block_size' of 'loftq' are those of quantize='nf4'"):
        started("linear", "nf4", init="loftq", init_options={"bits": 4, "block_size": 64})


def test_loading_a_base_over_the_one_that_an_init_made_is_refused():
    lora, _ = started("linear", "nf4", init="loftq")
    other, _ = started("linear", "nf4")
    with pytest.raises(Exception, match="which changed the base; another base would undo that"):
        lora.model.load_state_dict(other.unload(dequantize=False).state_dict())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_left_of_a_base_in_half_precision_is_stored_without_rounding_it_first(init):
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    single = copy.deepcopy(half).float()
    for model in (half, single):
        LoraModel(model, LoraConfig(r=4, init=init, quantize="nf4", quantize_options={"min_size": 0}))
    codes = [{key: value for key, value in model.state_dict().items() if "stored" in key} for model in (half, single)]
    assert [key for key, value in codes[0].items() if not torch.equal(value, codes[1][key])] == []
