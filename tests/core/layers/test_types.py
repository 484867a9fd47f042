"""Every layer type in every type of weight: eval, training, merging, mixed batches and autocast, against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora_plugins import LoraConfig, LoraModel, StateError
from tests.core.layer_cases import LAYER_CASES
from tests.slow import thinned

NAMES = (
    "linear",
    "linear-no_bias",
    "transformers_conv1d",
    *(f"conv{n}d-groups{g}-stride1-dilation1-zeros" for n in (1, 2, 3) for g in (1, 2, 4)),
    "conv2d-groups1-stride2-dilation2-circular",
    *(f"conv_transpose{n}d-groups{g}-stride1-dilation1" for n in (1, 2, 3) for g in (1, 4)),
    "conv2d-same_padding",
    "conv2d-same-timm-depthwise",
    "conv2d-std-timm",
    "conv2d-squared_weight",
    "embedding-padding",
    "embedding-scale_grad",
)
CASES = {case.id: case for case in LAYER_CASES if case.id in NAMES}
TYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
MODES = ("eval", "train", "merge", "mixed")


class Setting:
    """One layer of some type, its adapter, and the same in float64 with the update written out."""

    def __init__(self, case, dtype, autocast=False):
        torch.manual_seed(0)
        self.case, self.dtype, self.autocast = case, dtype, autocast
        self.model = nn.Sequential(case.make()).to(dtype).eval()
        self.inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
        self.base = copy.deepcopy(self.model)
        self.plain = self.run(self.base)  # raises where torch itself cannot do it
        self.lora = LoraModel(self.model, LoraConfig(r=2, alpha=3, init="gaussian"), "a")
        with torch.no_grad():
            for parameter in self.factors().values():
                parameter.copy_(torch.randn_like(parameter) / 4)

    def factors(self):
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def run(self, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return model(*self.inputs)

    def exact(self, factors):
        """What the law says, in float64, of the values as they are."""
        base = copy.deepcopy(self.base).double().train(self.model.training)
        weight = dict(base.named_parameters())[f"0.{self.case.weight}"].detach()
        A, B = (factors[f"0.lora_{factor}.a"].double() for factor in "AB")
        values = {f"0.{self.case.weight}": weight + 1.5 * self.case.layout(B @ A, weight.shape)}
        return functional_call(base, values, tuple(x.double() if x.is_floating_point() else x for x in self.inputs))

    def near(self, found, expected, roundings=8):
        """Compares up to some roundings of the largest value, in the type that is computed in."""
        eps = torch.finfo(torch.bfloat16 if self.autocast else self.dtype).eps
        allowed = roundings * eps * (1 + float(expected.detach().abs().max()))
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=allowed)


def setting(name, type_name, **options):
    try:
        return Setting(CASES[name], TYPES[type_name], **options)
    except RuntimeError as error:  # an operation that torch does not have for this type on a CPU
        pytest.skip(f"the layer itself: {error}")


def check_eval(s):
    y = s.run(s.model)
    assert y.dtype == s.plain.dtype
    s.near(y, s.exact(s.factors()))


def check_train(s):
    s.model.train()
    y, factors = s.run(s.model), s.factors()
    assert y.dtype == s.plain.dtype
    leaves = {name: p.detach().double().requires_grad_() for name, p in factors.items()}
    exact = s.exact(leaves)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    found = torch.autograd.grad((y.double() * weights).sum(), list(factors.values()))
    expected = torch.autograd.grad((exact * weights).sum(), list(leaves.values()))
    for parameter, gradient, wanted in zip(factors.values(), found, expected, strict=True):
        assert parameter.dtype == gradient.dtype == torch.promote_types(s.dtype, torch.float32)
        s.near(gradient, wanted, roundings=32)  # a gradient sums over batch and positions


def check_merge(s):
    y = s.run(s.model)
    s.lora.merge_adapter(max_error=1)
    s.near(s.run(s.model), y)
    s.lora.unmerge_adapter()
    assert torch.equal(s.run(s.model), y)
    s.lora.merge_and_unload(max_error=1)
    assert {name: p.dtype for name, p in s.model.named_parameters()} == {
        name: p.dtype for name, p in s.base.named_parameters()
    }
    assert s.run(s.model).dtype == s.plain.dtype
    s.near(s.run(s.model), y)


def check_mixed(s):
    y = s.run(s.model)
    try:
        with s.lora.mixed_batch(["a", None, *[None] * (len(y) - 2)]):
            rows = s.run(s.model)
    except StateError as refused:
        assert "cannot mix" in str(refused)  # noqa: PT017 - the law's layer types that have no rows
        return
    assert rows.dtype == s.plain.dtype
    s.near(rows[0], y[0])
    s.near(rows[1:], s.plain[1:])


CHECKS = {"eval": check_eval, "train": check_train, "merge": check_merge, "mixed": check_mixed}


@thinned(2, name=NAMES, type_name=[*TYPES], mode=MODES)
def test_in_every_type(name, type_name, mode):
    CHECKS[mode](setting(name, type_name))


@thinned(2, name=NAMES, type_name=["float32", "bfloat16"], mode=MODES)
def test_under_autocast(name, type_name, mode):
    CHECKS[mode](setting(name, type_name, autocast=True))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", [name for name in NAMES if "std" not in name])  # which torch does not compute
def test_weights_of_8_bits_lose_nothing_of_an_update_under_autocast(name, variant):
    """They compute as the same values do in the type of autocast, to the last bit."""
    if variant == "dora" and "transpose" in name:
        pytest.skip("rows of its matrix are no outputs")
    torch.manual_seed(0)
    layer = CASES[name].make().to(torch.bfloat16).requires_grad_(False)
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in CASES[name].inputs()]
    few_bits = layer.weight.to(torch.float8_e4m3fn)
    found = []
    for weight in (few_bits, few_bits.bfloat16()):
        model = nn.Sequential(copy.deepcopy(layer))
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        torch.manual_seed(1)
        LoraModel(model, LoraConfig(r=2, alpha=0.01, init="none", variant=variant))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(*inputs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([y, *torch.autograd.grad(y.float().square().sum(), trained)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ["linear", "conv2d-groups1-stride1-dilation1-zeros"])
def test_a_mixed_batch_of_a_layer_of_8_bits_under_autocast(name, variant):
    torch.manual_seed(0)
    layer = CASES[name].make().to(torch.float8_e4m3fn)
    (x,) = CASES[name].inputs()
    found = []
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        model = nn.Sequential(copy.deepcopy(layer).to(dtype)).eval()
        torch.manual_seed(1)
        lora = LoraModel(model, LoraConfig(r=2, init="none", variant=variant), "a")
        with lora.mixed_batch(["a", *[None] * (len(x) - 1)]), torch.autocast("cpu", torch.bfloat16):
            found.append(model(x.bfloat16()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_of_a_linear_layer_that_are_added_term_by_term(dtype, variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24)).to(dtype)
    lora = LoraModel(model, LoraConfig(r=2, init="none", dropout=1e-9, variant=variant), "a")
    lora.add_adapter("b", LoraConfig(r=2, init="none", dropout=2e-9, variant=variant))
    lora.set_adapter(["a", "b"])
    x = torch.randn(5, 8).to(dtype)
    y, exact = model(x).detach(), copy.deepcopy(model).double()(x.double()).detach()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max()))
