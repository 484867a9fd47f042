"""Variants: DoRA against its formula and against PEFT, and whoever brings a variant through the door."""

import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed.measure import kept_bytes
from lora_plugins import LoraConfig, LoraModel, PluginError, StateError, TargetError, VariantPlugin
from lora_plugins.variants.dora import DoraVariant
from tests.core.libraries import Conv1D
from tests.core.registries import registry_of

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def values(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def indices() -> Tensor:
    """Some rows more than once, that of a padding among them."""
    return torch.tensor([[0, 3, 3, 1], [6, 0, 2, 3]])


ROWS = {
    "linear": (lambda: nn.Linear(6, 5), values(4, 6)),
    "linear-no_bias": (lambda: nn.Linear(6, 5, bias=False), values(4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), values(2, 4, 7, 7)),
    "conv2d-grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1),
        values(2, 4, 7, 7),
    ),
    "conv2d-no_bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), values(2, 4, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), values(2, 4, 7)),
}
"""Layers whose weight has its outputs first."""

LOOKUPS = {
    "embedding": (lambda: nn.Embedding(7, 5), indices),
    "embedding-padding": (lambda: nn.Embedding(7, 5, padding_idx=3), indices),
    "embedding-sparse": (lambda: nn.Embedding(7, 5, sparse=True), indices),
    "embedding-scale_grad": (lambda: nn.Embedding(7, 5, padding_idx=0, scale_grad_by_freq=True), indices),
}
MAX_NORM = {"embedding-max_norm": (lambda: nn.Embedding(7, 5, max_norm=0.5), indices)}
TRANSPOSED = {"transformers_conv1d": (lambda: Conv1D(5, 6), values(4, 6))}
LAYERS = {**ROWS, **TRANSPOSED, **LOOKUPS, **MAX_NORM}


def of(cases: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("make", "inputs"), cases.values(), ids=cases)


layers = of(LAYERS)


def adapted(make, **fields) -> LoraModel:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    model.eval()
    fields = {"r": 2, "alpha": 3, "init": "none", "variant": "dora", **fields}
    lora = LoraModel(model, LoraConfig(**fields))
    with torch.no_grad():
        model[0].lora_magnitude["default"].mul_(1.3)
    return lora


def by_the_formula(lora: LoraModel) -> nn.Module:
    """The untouched layer with the weight of the paper's formula, its norm without a gradient."""
    layer = lora.model[0]
    A, B, m = (layer._modules[f"lora_{name}"]["default"] for name in ("A", "B", "magnitude"))
    W = layer._parameters["weight"].detach()
    inputs_first = isinstance(layer, nn.Embedding) or not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    V = (W.T if inputs_first else W.flatten(1)) + 1.5 * (B @ A)
    updated = (m / V.detach().norm(dim=1))[:, None] * V
    plain = LoraModel(copy.deepcopy(lora.model)).unload()[0]
    plain.sparse = False  # the weight of the formula is no leaf
    del plain.weight
    plain.weight = updated.T if inputs_first else updated.view_as(W)
    return plain


@layers
def test_forward_and_gradients_follow_the_formula(make, inputs):
    lora, x = adapted(make), inputs()
    leaves = [p for p in lora.model.parameters() if p.requires_grad]
    assert len(leaves) == 3
    expected, output = by_the_formula(lora)(x), lora.model(x)
    torch.testing.assert_close(output, expected, **TIGHT)
    wanted = torch.autograd.grad(expected.sin().sum(), leaves)
    for got, want in zip(torch.autograd.grad(output.sin().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)
        assert want.abs().max() > 0


@layers
def test_it_starts_as_the_model_was(make, inputs):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).double(), inputs()
    before = model(x)
    LoraModel(model, LoraConfig(variant="dora"))
    torch.testing.assert_close(model(x), before, **TIGHT)


@layers
def test_its_life(make, inputs, tmp_path):
    lora, x = adapted(make), inputs()
    layer = lora.model[0]
    plain = {key: value.clone() for key, value in lora.model.state_dict().items() if "lora_" not in key}
    output = lora.model(x)
    assert lora.plans["default"].trainable == sum(p.numel() for p in lora.model.parameters() if p.requires_grad)
    for twin in (copy.deepcopy(lora.model), pickle.loads(pickle.dumps(lora.model))):
        torch.testing.assert_close(twin(x), output, rtol=0, atol=0)
    lora.save_adapter(tmp_path / "adapter")
    lora.merge_adapter()
    assert "Lora" not in type(layer).__name__
    torch.testing.assert_close(lora.model(x), output, **TIGHT)
    lora.unmerge_adapter()
    torch.testing.assert_close(lora.model(x), output, rtol=0, atol=0)
    lora.unload()
    assert lora.model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in lora.model.state_dict().items())
    again = LoraModel.load_adapter(lora.model, tmp_path / "adapter")
    torch.testing.assert_close(again.model(x), output, rtol=0, atol=0)
    torch.testing.assert_close(again.merge_and_unload()(x), output, **TIGHT)


@of(ROWS | TRANSPOSED)
def test_dropout_acts_on_the_input_of_the_update(make, inputs):
    lora, x = adapted(make, dropout=0.5), inputs()
    expected = lora.model.eval()(x)
    with lora.disable_adapter() as base:
        plain = base(x)
    lora.model.train()
    torch.manual_seed(0)
    mean = torch.stack([lora.model(x) - plain for _ in range(600)]).mean(0)
    assert (mean - (expected - plain)).abs().mean() < 0.25 * (expected - plain).abs().mean()
    assert not torch.equal(lora.model(x), lora.model(x))


def trained(layer: nn.Module) -> list[Tensor]:
    return [layer._modules[f"lora_{name}"]["default"] for name in ("A", "B", "magnitude")]


def trained_by_peft(layer: nn.Module) -> list[Tensor]:
    if isinstance(layer.base_layer, nn.Embedding):
        factors = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    else:
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [*factors, layer.lora_magnitude_vector["default"].weight]


@pytest.mark.parametrize("name", ["linear", "conv2d", "transformers_conv1d", "embedding"])
def test_peft_computes_the_same(name):
    peft = pytest.importorskip("peft")
    make, inputs = LAYERS[name]
    lora, x = adapted(make), inputs()
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["0"],
        use_dora=True,
        init_lora_weights=False,
        fan_in_fan_out=name in TRANSPOSED,
    )
    theirs = peft.get_peft_model(nn.Sequential(make()).double(), config)
    layer, ours = theirs.base_model.model[0], lora.model[0]
    with torch.no_grad():
        layer.base_layer.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" not in k})
        for mine, same in zip(trained(ours), trained_by_peft(layer), strict=True):
            same.copy_(mine.view_as(same))
    output, expected = lora.model(x), theirs(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)  # PEFT keeps its magnitude in float32
    wanted = torch.autograd.grad(expected.sin().sum(), trained_by_peft(layer))
    got = torch.autograd.grad(output.sin().sum(), trained(ours))
    for ours_, theirs_ in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_.flatten(), theirs_.flatten().double(), rtol=1e-5, atol=1e-6)


def test_beside_a_plain_adapter():
    lora = adapted(LAYERS["linear"][0])
    x = torch.randn(4, 6, dtype=torch.float64)
    dora = lora.model(x)
    lora.add_adapter("plain", LoraConfig(r=2, init="none"))
    with lora.disable_adapter() as base:
        plain_output = base(x)
    lora.set_adapter("plain")
    plain = lora.model(x)
    lora.set_adapter(["default", "plain"])
    torch.testing.assert_close(lora.model(x), dora + plain - plain_output, **TIGHT)
    with pytest.raises(StateError, match="all active adapters have to be merged at once: 'default', 'plain'"):
        lora.merge_adapter("plain")
    lora.merge_adapter()
    torch.testing.assert_close(lora.model(x), dora + plain - plain_output, **TIGHT)


def test_a_layer_whose_matrix_has_other_rows_than_outputs_is_refused():
    with pytest.raises(TargetError, match="'0': the variant 'dora' needs a row of the weight's matrix for each"):
        LoraModel(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), LoraConfig(variant="dora"))


class LinearAlone(DoraVariant):
    name = "linear_alone"

    def refusal(self, plugin):
        return None if plugin.name == "linear" else "other layers have no gate"


def test_a_layer_that_a_variant_refuses_is_named_with_both():
    model, config = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), LoraConfig(variant="linear_alone")
    with pytest.raises(TargetError, match="'1': the variant 'linear_alone' refuses 'embedding': other layers have no"):
        LoraModel(model, config, registry=registry_of(LinearAlone()))


def test_it_cannot_be_combined():
    lora = adapted(LAYERS["linear"][0])
    with pytest.raises(StateError, match="of the variant 'dora', whose updates do not add up"):
        lora.add_weighted_adapter(["default"], [0.5], "half")


@of(ROWS | TRANSPOSED | LOOKUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
def test_rows_of_a_batch_have_adapters_of_their_own(make, inputs, dtype):
    lora = adapted(make)
    lora.add_adapter("plain", LoraConfig(r=3, alpha=5, init="none"))
    lora.add_adapter("other", LoraConfig(r=1, init="none", variant="dora"))
    lora.model.eval().to(dtype)
    names = ["other", None, "default", "plain", "default"]
    x = torch.cat([inputs()] * 3)[: len(names)]
    x = x.to(dtype) if x.is_floating_point() else x
    with lora.mixed_batch(names):
        mixed = lora.model(x)
    for row, name in enumerate(names):
        if name is None:
            with lora.disable_adapter() as base:
                alone = base(x)
        else:
            lora.set_adapter(name)
            alone = lora.model(x)
        tolerance = (
            TIGHT if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
        )  # the weight alone is rounded, too
        torch.testing.assert_close(mixed[row], alone[row], **tolerance)


def test_parts_of_a_layer_are_not_mixed():
    config = LoraConfig(r=2, variant="dora", fused_parts={"0": ["q", "v"]})
    lora = LoraModel(nn.Sequential(nn.Linear(6, 9)).eval(), config)
    match = "'0': the variant 'dora' covers a part of its weight alone"
    with pytest.raises(StateError, match=match), lora.mixed_batch(["default"]):
        pass


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16_autocast"])
def test_it_keeps_what_plain_lora_keeps(memory, dropout, dtype):
    kept = {}
    for variant in ("lora", "dora"):
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))
        model.append(nn.Conv2d(1, 4, 3)).append(nn.LayerNorm(6)).append(nn.Conv2d(4, 4, 1))
        LoraModel(model, LoraConfig(r=2, variant=variant, dropout=dropout, memory=memory, init="none"))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            kept[variant] = kept_bytes(model, (torch.randn(64, 32, requires_grad=True),))
    assert kept["dora"] <= 1.05 * kept["lora"]


@layers
def test_it_compiles_whole(make, inputs):
    torch._dynamo.reset()
    lora, x = adapted(make), inputs()
    lora.model.train()
    leaves = [p for p in lora.model.parameters() if p.requires_grad]
    compiled = torch.compile(lora.model, backend="aot_eager", fullgraph=True)
    got, wanted = ([y, *torch.autograd.grad(y.sin().sum(), leaves)] for y in (compiled(x), lora.model(x)))
    torch.testing.assert_close(got, wanted, **TIGHT)


def test_an_unknown_variant_is_refused():
    with pytest.raises(PluginError, match=r"no variant 'dorra'. Did you mean '(lora|dora)'"):
        LoraModel(nn.Sequential(nn.Linear(2, 2)), LoraConfig(variant="dorra"))


class Gated(VariantPlugin):
    """A variant that a third party might bring: one gate for the whole update."""

    name = "gated"

    def shapes(self, rows: int, columns: int, r: int) -> Mapping[str, tuple[int, ...]]:
        return {"gate": (1,)}

    def first_values(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Mapping[str, Tensor]:
        return {"gate": A.new_zeros(1)}

    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float, own: Mapping[str, Tensor]) -> Tensor:
        return own["gate"] * scaling * (B @ A)


def test_a_third_party_brings_a_variant():
    registry = registry_of(Gated())
    model = nn.Sequential(nn.Linear(3, 3)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    before = model(x)
    config = LoraConfig(r=2, alpha=2, init="none", variant="gated")
    LoraModel(model, config, registry=registry)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    with torch.no_grad():
        model[0].lora_gate["default"].fill_(2.0)
    A, B = model[0].lora_A["default"], model[0].lora_B["default"]
    torch.testing.assert_close(model(x), before + 2 * x @ (B @ A).T, **TIGHT)


@pytest.mark.parametrize("name", ["", "lora"])
def test_a_bad_name_is_refused(name):
    bad = type("Bad", (Gated,), {"name": name})

    registry = registry_of(bad())
    assert "PluginError" in next(info.state for info in registry.plugins if info.name == "mine")


def test_dora_leaves_a_row_of_zeros_as_it_is():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    expected = layer.weight.detach().clone()
    LoraModel(nn.Sequential(layer), LoraConfig(r=2, variant="dora"))
    torch.testing.assert_close(layer.weight.detach(), expected)
