"""A module that hands the weight of a layer to `F.linear` gets what it would by calling the layer."""

import contextlib
import copy

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_plugins import LoraConfig, LoraModel, StateError
from tests.core.libraries import create_model
from tests.slow import slow_but

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


class Reads(nn.Module):
    """Calls torch's function, with a bias of its own, as the attention of BEiT and Swin V2 does."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(96, 144, bias=bias)
        self.own = nn.Parameter(torch.randn(144))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.qkv.weight, bias=self.own).tanh()


class Calls(Reads):
    """Calls the layer, whose bias is that."""

    def forward(self, x: Tensor) -> Tensor:
        bias = 0 if self.qkv.bias is None else self.qkv.bias
        return (self.qkv(x) - bias + self.own).tanh()


def pair(dtype=torch.float64, bias=True, **fields):
    """One that reads and one that calls, with the same values."""
    modules = []
    for kind in (Reads, Calls):
        torch.manual_seed(0)
        module = kind(bias).to(dtype)
        LoraModel(module, LoraConfig(**{"r": 4, "init": "none", "dropout": 0.3, **fields}))
        modules.append(module)
    modules[0].load_state_dict(modules[1].state_dict())
    return modules


def values(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(5, 7, 96, dtype=dtype)


def step(run, module, x):
    """The output and all gradients of a step, with the same masks each time."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for name, p in module.named_parameters() if "lora_" in name)]


FIELDS = {
    "plain": {},
    "dora": {"variant": "dora"},
    "parts": {"fused_parts": {"qkv": ["q", "v"]}},
    "low_memory": {"memory": "low"},
    "nf4": {"quantize": "nf4"},
    "int8": {"quantize": "int8"},
}
TYPES = {
    "float64": (torch.float64, None, 1e-12),
    "float32": (torch.float32, None, 1e-5),
    "autocast": (torch.float32, torch.bfloat16, 3e-2),
    "bfloat16": (torch.bfloat16, None, 3e-2),
}


@pytest.mark.parametrize(("dtype", "autocast", "tolerance"), TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_dropout_acts_as_in_a_call(fields, bias, dtype, autocast, tolerance):
    results = []
    for module in pair(dtype, bias, **fields):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            results.append(step(module, module, values(dtype)))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_it_drops_in_training_only():
    reads, _ = pair()
    x = values()
    assert not torch.equal(reads(x), reads(x))
    reads.eval()
    merged = LoraModel(copy.deepcopy(reads)).merge_and_unload()
    torch.testing.assert_close(reads(x), merged(x), **TIGHT)


def test_several_adapters_drop_each_for_itself():
    results = []
    for module in pair():
        lora = LoraModel(module)
        lora.add_adapter("second", LoraConfig(r=2, alpha=3, init="none", dropout=0.5))
        with torch.no_grad():
            for parameter in module.qkv.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        lora.set_adapter(["default", "second"], weights=[0.5, 2.0])
        results.append(step(module, module, values()))
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("around", ["checkpointed", "compiled"])
def test_it_computes_so_when(around):
    reads, _ = pair()
    ways = {
        "checkpointed": lambda x: checkpoint(reads, x, use_reentrant=False),
        "compiled": torch.compile(reads, backend="aot_eager", fullgraph=True),
    }
    torch.testing.assert_close(step(ways[around], reads, values()), step(reads, reads, values()), **TIGHT)


not_before_2_10 = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="torch 2.8 and 2.9 export no layer that drops so"
)


@pytest.mark.parametrize(
    "strict", [pytest.param(True, marks=not_before_2_10, id="strict"), pytest.param(False, id="not_strict")]
)
def test_it_drops_in_a_graph_that_is_exported_for_training(strict):
    x = values()
    graphs = [torch.export.export(module, (x,), strict=strict).module() for module in pair()]
    results = []
    for graph in graphs:
        torch.manual_seed(2)
        results.append([graph(x), graph(x)])
    torch.testing.assert_close(*results, **TIGHT)
    assert not torch.equal(*results[0])


@pytest.mark.parametrize("use", [F.linear, lambda x, weight: x @ weight.T], ids=["call", "another_use"])
def test_a_weight_that_was_read_before_unload_is_still_named(use):
    reads, _ = pair()
    weight = reads.qkv.weight
    LoraModel(reads).unload()
    with pytest.raises(StateError, match="'qkv' is used by another module without calling the layer"):
        use(values(), weight).sum().backward()


class Product(torch.autograd.Function):
    """A product whose gradients are written out."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, -2).T @ x.flatten(0, -2)


USES = {
    "product": lambda x, weight: x @ weight.T,
    "part": lambda x, weight: F.linear(x, weight[:48]),
    "cast": lambda x, weight: F.linear(x, weight.float().double()),
    "joined": lambda x, weight: F.linear(x, torch.cat([weight, weight])),
    "input": lambda x, weight: F.linear(weight.T, x.flatten(0, -2)[:4, :1].expand(4, 144)),
    "function": Product.apply,
    "split": lambda x, weight: F.linear(x, weight.chunk(3)[1]),
    "matmul": lambda x, weight: torch.matmul(x.new_ones(2, 144), weight),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_another_use_in_training_is_refused_at_the_first_backward(use):
    reads, _ = pair()
    reads.forward = lambda x: use(x, reads.qkv.weight)
    with pytest.raises(StateError, match="'qkv' is used by another module without calling the layer"):
        reads(values()).sum().backward()
    reads.eval()
    reads(values()).sum().backward()


# Compilers look at the gradients of tensors, and make functions of autograd.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.* should not be instantiated")
@pytest.mark.parametrize("use", slow_but(USES.values(), [*USES.values()][::3]), ids=USES)
def test_another_use_is_refused_when_it_is_compiled(use):
    reads, _ = pair()
    torch.compiler.reset()
    with pytest.raises(StateError, match="'qkv' is used by another module without calling the layer"):
        torch.compile(lambda x: use(x, reads.qkv.weight), backend="aot_eager")(values()).sum().backward()


def test_a_saved_weight_is_a_plain_tensor(tmp_path):
    reads, _ = pair()
    torch.save(reads.qkv.weight.data, tmp_path / "data.pt")
    torch.save(reads.qkv.weight, tmp_path / "weight.pt")
    data, weight = (torch.load(tmp_path / name, weights_only=True) for name in ("data.pt", "weight.pt"))
    assert torch.equal(data, weight.detach())


def test_the_weight_can_be_looked_at_in_training():
    reads, _ = pair()
    weight = reads.qkv.weight
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.float64, (144, 96), "cpu")
    assert torch.equal(weight.detach(), reads.eval().qkv.weight)
    assert torch.equal(weight.detach().sum(dim=1), weight.sum(dim=1))


def test_rows_of_a_batch_have_their_adapters():
    reads, _ = pair(dropout=0.0)
    lora = LoraModel(reads.eval())
    lora.add_adapter("second", LoraConfig(r=2, init="none", variant="dora"))
    x = values()
    with torch.no_grad(), lora.mixed_batch(["second", None, "default", "second", None]):
        got = reads(x)
    for names, rows in (("default", [2]), ("second", [0, 3])):
        lora.set_adapter(names)
        torch.testing.assert_close(got[rows], reads(x)[rows].detach(), **TIGHT)
    with lora.disable_adapter():
        torch.testing.assert_close(got[[1, 4]], reads(x)[[1, 4]].detach(), **TIGHT)


@pytest.mark.parametrize("name", [name for name in USES if name != "function"])  # which takes tensors alone
def test_another_use_by_rows_of_a_batch_is_refused(name):
    reads, _ = pair(dropout=0.0)
    lora = LoraModel(reads.eval())
    reads.forward = lambda x: USES[name](x, reads.qkv.weight)
    with (
        lora.mixed_batch([None, "default"]),
        pytest.raises(StateError, match="'qkv' is used by another module without calling the layer"),
    ):
        reads(values()[:2])


SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32}


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_vision_transformers_of_timm_drop_and_mix(name):
    torch.manual_seed(0)
    model = create_model(name, **SIZES | ({"img_size": 28} if "14" in name else {})).double()
    lora = LoraModel(model, LoraConfig(r=2, init="none", dropout=0.3))
    x = torch.randn(2, 3, *[28 if "14" in name else 32] * 2, dtype=torch.float64)
    model.train()(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    lora.add_adapter("second", LoraConfig(r=3, init="none"))
    with torch.no_grad(), lora.mixed_batch(["second", "default"]):
        got = model(x)
    torch.testing.assert_close(got[1], model(x)[1].detach(), **TIGHT)
    lora.set_adapter("second")
    torch.testing.assert_close(got[0], model(x)[0].detach(), **TIGHT)
