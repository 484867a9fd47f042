"""PiSSA, OLoRA and the orthogonal start: what PEFT makes of the same layer and seed, and what becomes of the base."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, InitContext, InitPlugin, LoraConfig, LoraModel, TargetError
from lora_plugins.plugins import INITS, default_registry

LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "linear-bfloat16": lambda: nn.Linear(24, 16).bfloat16(),
    "linear-float64": lambda: nn.Linear(24, 16).double(),
    "conv2d": lambda: nn.Conv2d(4, 16, 3, groups=2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(16, 12, 3),
    "embedding": lambda: nn.Embedding(24, 16),
}
layers = pytest.mark.parametrize("kind", LAYERS)
CHANGING = [("pissa", {}), ("pissa", {"niter": 8}), ("olora", {})]
changing = pytest.mark.parametrize(("init", "options"), CHANGING, ids=["pissa", "pissa-niter", "olora"])


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": LAYERS[kind]()})


def fill(init: str, layer: nn.Linear, r: int, scaling: float, **options) -> tuple[InitPlugin, InitContext, dict]:
    """Lets an init fill factors from seed 0, as `LoraModel` does from a seed of its own."""
    plugin = default_registry().get(INITS, init)
    context = InitContext(
        layer="layer",
        weight=layer.weight.detach(),
        A=torch.empty(r, layer.in_features),
        B=torch.empty(layer.out_features, r),
        scaling=scaling,
        lookup=False,
        generator=torch.Generator().manual_seed(0),
        options={**plugin.options, **options},
    )
    return plugin, context, dict(plugin.fill(context))


def peft_layer(layer: nn.Linear, r: int, alpha: int):
    """PEFT's layer around a copy of ours."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(layer)}), config).base_model.model["layer"]


class TestAgainstPeft:
    """On the same Linear and seed; PEFT has none of these for other layers."""

    @pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)], ids=str)
    @pytest.mark.parametrize(("r", "alpha"), [(2, 2), (4, 16), (8, 4)], ids=str)
    @pytest.mark.parametrize(("init", "options"), [("pissa", {}), ("pissa", {"niter": 8}), ("olora", {})], ids=str)
    def test_factors_and_base(self, shape, r, alpha, init, options):
        torch.manual_seed(3)
        layer = nn.Linear(*shape)
        theirs = peft_layer(layer, r, alpha)
        torch.manual_seed(0)
        if init == "olora":
            theirs.olora_init("default")
        else:
            theirs.pissa_init("default", "pissa_niter_8" if options else "pissa")
        plugin, context, recipe = fill(init, layer, r, alpha / r, **options)
        base = plugin.changed_base(context.weight, recipe, context.scaling, context.options)
        # Both compute in float32; PEFT subtracts a product in float32 where we subtract in float64.
        torch.testing.assert_close(context.A, theirs.lora_A["default"].weight.data, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(context.B, theirs.lora_B["default"].weight.data, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(base, theirs.base_layer.weight.data, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("r", [2, 8])
    def test_orthogonal(self, r):
        layer = nn.Linear(24, 16)
        theirs = peft_layer(layer, r, r)
        torch.manual_seed(0)
        theirs.orthogonal_init("default")
        _, context, _ = fill("orthogonal", layer, r, 1.0)
        assert torch.equal(context.A, theirs.lora_A["default"].weight.data)
        assert torch.equal(context.B, theirs.lora_B["default"].weight.data)


class TestChangedBase:
    @layers
    @changing
    def test_starts_as_an_identity_up_to_rounding(self, kind, init, options):
        model = model_of(kind)
        weight = model["layer"].weight.detach().clone()
        lora = LoraModel(model, LoraConfig(r=4, alpha=6.0, init=init, init_options=options))
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(model["layer"].weight.detach(), weight, rtol=0, atol=8 * eps)
        assert not torch.equal(model.state_dict()["layer.weight"], weight)
        with lora.disable_adapter():
            assert torch.equal(model["layer"].weight, weight)
        assert torch.equal(lora.unload()["layer"].weight, weight)

    @layers
    @changing
    def test_is_rebuilt_bit_for_bit(self, kind, init, options, tmp_path):
        base = model_of(kind)
        model = copy.deepcopy(base)
        lora = LoraModel(model, LoraConfig(r=4, alpha=6.0, init=init, init_options=options))
        with torch.no_grad():  # training moves both factors away from the recipe
            model["layer"].lora_A["default"].mul_(1.5)
            model["layer"].lora_B["default"].add_(0.1)
        lora.save_adapter(tmp_path)
        fresh = copy.deepcopy(base)
        torch.manual_seed(99)
        LoraModel.load_adapter(fresh, tmp_path)
        changed = model.state_dict()
        assert all(torch.equal(value, changed[key]) for key, value in fresh.state_dict().items())
        LoraModel(fresh).unload()
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in base.state_dict().items())

    @changing
    def test_does_not_depend_on_the_number_of_threads(self, init, options):
        torch.manual_seed(0)
        layer = nn.Linear(200, 300).double()
        plugin, context, recipe = fill(init, layer.float(), 8, 1.0, **options)
        threads = torch.get_num_threads()
        weight, found = layer.weight.detach().double(), []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(plugin.changed_base(weight, recipe, 1.3, context.options))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)

    def test_parts_of_a_fused_weight_leave_the_others(self):
        torch.manual_seed(0)
        model = nn.ModuleDict({"qkv": nn.Linear(12, 36)})
        weight = model["qkv"].weight.detach().clone()
        config = LoraConfig(r=2, target_modules=["qkv"], init="pissa", fused_parts={"qkv": ["q", "v"]})
        LoraModel(model, config)
        changed = model.state_dict()["qkv.weight"]
        assert torch.equal(changed[12:24], weight[12:24])
        assert not torch.equal(changed[:12], weight[:12])
        assert not torch.equal(changed[24:], weight[24:])


@changing
def test_ranks_that_the_matrix_does_not_have_can_still_be_trained(init, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))  # the matrix is (8, 9)
    lora = LoraModel(model, LoraConfig(r=12, init=init, init_options=options))
    A, B = model[0].lora_A["default"], model[0].lora_B["default"]
    assert not B[:, 8:].any()
    assert (A[8:].norm(dim=1) > 0.1).all()
    model(torch.randn(2, 8, 5, 5)).square().sum().backward()
    assert (B.grad.norm(dim=0) > 0).all()
    lora.unload()


@layers
def test_orthogonal_is_an_identity_whose_factors_both_learn(kind):
    model = model_of(kind)
    weight = model["layer"].weight.detach().clone()
    LoraModel(model, LoraConfig(r=4, init="orthogonal"))
    A, B = model["layer"].lora_A["default"], model["layer"].lora_B["default"]
    assert (B @ A).norm() <= 8 * torch.finfo(A.dtype).eps * B.norm() * A.norm()
    assert torch.equal(model.state_dict()["layer.weight"], weight)
    model["layer"].weight.float().square().sum().backward()
    assert A.grad.any()
    assert B.grad.any()


def test_orthogonal_refuses_an_odd_rank_by_layer(untouched):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    with untouched(model), pytest.raises(TargetError, match=r"'1\.0': .*even; it is 3"):
        LoraModel(model, LoraConfig(r=2, init="orthogonal", rank_pattern={"1.0": 3}))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_computed_weight_is_refused_by_layer(init, untouched):
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    said = f"'1': 'weight' is a buffer, or computed, so the init '{init}'"
    with untouched(model), pytest.raises(TargetError, match=said):
        LoraModel(model, LoraConfig(init=init))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_weight_that_is_not_finite_is_refused_by_layer(init, value):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = value
    with pytest.raises(TargetError, match=rf"'1': its weight .* not finite, so the init '{init}'"):
        LoraModel(model, LoraConfig(init=init))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("niter", [-1, 2.5, True, "16"])
def test_pissa_refuses_bad_iterations(niter):
    with pytest.raises(ConfigError, match="niter of pissa"):
        LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(init="pissa", init_options={"niter": niter}))


@pytest.mark.parametrize(
    ("init", "options"), [*CHANGING, ("orthogonal", {})], ids=["pissa", "pissa-niter", "olora", "orthogonal"]
)
def test_is_reproducible_and_leaves_the_random_numbers_alone(init, options):
    found = []
    for drawn in (0, 3):
        model = model_of("linear")
        torch.randn(drawn)
        state = torch.get_rng_state()
        LoraModel(model, LoraConfig(r=4, init=init, init_options=options))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
