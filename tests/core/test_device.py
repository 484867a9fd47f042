"""Whatever the device: adapters follow their model, and no step waits for a card.

Without a card, a step runs on meta tensors under a watch (`card.py`): nothing in it reads a value, goes from one device
to another or is made beside the card. A source check says the same of what such a step does not reach. With one, torch
counts: `pytest tests/core/test_device.py --device cuda`.
"""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_plugins
from lora_plugins import InitData, InitPlugin, LoraConfig, LoraModel
from lora_plugins.utils import own_randomness
from tests.core.card import CARD, WaitError, Watch
from tests.core.layer_cases import LAYER_CASES
from tests.core.registries import registry_of

EVERY_TYPE = {case.id: (case.make, case.inputs) for case in LAYER_CASES} | {
    "lstm": (lambda: nn.LSTM(6, 5, 2, bidirectional=True), lambda: (torch.randn(3, 2, 6),)),
    "gru_cell": (lambda: nn.GRUCell(6, 5), lambda: (torch.randn(2, 6), torch.randn(2, 5))),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda: (torch.randn(3, 2, 8),) * 3),
}
DROPPING = ["linear", "conv2d-groups1-stride2-dilation1-zeros", "conv2d-groups2-stride1-dilation1-reflect"]
SOME = [
    *DROPPING,
    "conv2d-groups4-stride1-dilation1-zeros",
    "conv_transpose2d-groups1-stride2-dilation1",
    "embedding-padding",
    "lstm",
    "attention",
]
SMALL = {"min_size": 0}
OPTIONS = {
    "dora": {"variant": "dora"},
    "low_memory": {"memory": "low"},
    "nf4": {"quantize": "nf4", "quantize_options": SMALL},
    "nf4-dora": {"quantize": "nf4", "quantize_options": {**SMALL, "double_quant": False}, "variant": "dora"},
    "int8": {"quantize": "int8", "quantize_options": SMALL},
}
ROWS_FIRST = [layer for layer in SOME if "transpose" not in layer and "embedding" not in layer]
SOME_FOR = {name: ROWS_FIRST if "dora" in name else SOME for name in OPTIONS}
STEPS = [
    *[pytest.param(layer, {}, id=layer) for layer in EVERY_TYPE],
    *[pytest.param(layer, OPTIONS[name], id=f"{layer}-{name}") for name in OPTIONS for layer in SOME_FOR[name]],
    *[pytest.param(layer, {"dropout": 0.1}, id=f"{layer}-dropout") for layer in DROPPING],
    *[pytest.param(layer, {"dropout": 0.1, "variant": "dora"}, id=f"{layer}-dropout-dora") for layer in DROPPING],
]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def model_of(layer):
    """A model with that layer behind a normalization where it takes numbers, and inputs for it."""
    make, inputs = EVERY_TYPE[layer]
    given = inputs()
    before = [nn.LayerNorm(x.shape[-1]) if x.is_floating_point() else nn.Identity() for x in given]
    return Normalized(before, make()).double(), tuple(x.double() if x.is_floating_point() else x for x in given)


class Normalized(nn.Module):
    """A layer whose inputs `memory="low"` computes again."""

    def __init__(self, before, layer):
        super().__init__()
        self.before, self.layer = nn.ModuleList(before), layer

    def forward(self, *inputs):
        output = self.layer(*(norm(x) for norm, x in zip(self.before, inputs, strict=True)))
        return output[0] if isinstance(output, tuple) else output


def adapted(layer, **fields):
    torch.manual_seed(0)
    model, inputs = model_of(layer)
    config = LoraConfig(**{"r": 2, "alpha": 3.0, "init": "none", "target_modules": ["layer"], **fields})
    return LoraModel(model, config), inputs


def on_the_card(tensors):
    return tuple(x.to(CARD).requires_grad_(x.is_floating_point()) for x in tensors)


def results(model, inputs):
    """The output of a step and the gradients of everything that is trained."""
    output = model(*inputs)
    output.square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    return {"output": output.detach(), **trained}


@pytest.mark.parametrize(("layer", "fields"), STEPS)
def test_no_step_waits(layer, fields):
    lora, inputs = adapted(layer, **fields)
    model, inputs = lora.model.to(CARD), on_the_card(inputs)
    results(model, inputs)  # constants go there once
    model.zero_grad()
    with Watch():
        made = results(model, inputs)
    assert {tensor.device for tensor in made.values()} == {CARD}


@pytest.mark.parametrize("layer", DROPPING)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_no_checkpointed_step_waits(layer, reentrant):
    lora, inputs = adapted(layer, dropout=0.1, quantize="nf4", quantize_options=SMALL)
    model, inputs = lora.model.to(CARD), on_the_card(inputs)
    results(model, inputs)
    with Watch():
        checkpoint(model, *inputs, use_reentrant=reentrant, preserve_rng_state=False).sum().backward()


@pytest.mark.parametrize("layer", ["linear", "conv2d-groups1-stride2-dilation1-zeros", "embedding"])
def test_no_mixed_batch_waits(layer):
    lora, inputs = adapted(layer)
    lora.add_adapter("other", LoraConfig(r=3, init="none", target_modules=["layer"]))
    model, inputs = lora.model.eval().to(CARD), on_the_card(inputs)
    names = ["default", "other", None, "other"][: len(inputs[0])]
    with torch.no_grad(), lora.mixed_batch(names), Watch():
        assert model(*inputs).device == CARD


@pytest.mark.parametrize("layer", ["linear", "embedding-padding", "lstm"])
def test_no_switch_waits(layer):
    lora, inputs = adapted(layer)
    lora.add_adapter("other", LoraConfig(r=3, target_modules=["layer"]))
    model, inputs = lora.model.to(CARD), on_the_card(inputs)
    with Watch():
        lora.set_adapter(["default", "other"], weights=[0.5, 2.0])
        results(model, inputs)
        with lora.disable_adapter():
            model(*inputs)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(force=True),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.ones(4).to(x.device),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: x + torch.ones(4),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.zeros(4),
    ],
    ids=[
        "item", "bool", "mask", "nonzero", "tolist", "cpu", "to", "numpy", "equal", "tensor", "new_tensor", "to_card",
        "copy", "mixed", "index", "zeros",
    ],
)  # fmt: skip
def test_the_watch_sees(wait):
    with pytest.raises((WaitError, RuntimeError, NotImplementedError)), Watch():
        wait(torch.empty(4, device=CARD))


LIVES = [
    *[pytest.param("linear", {"init": init}, id=init) for init in ("kaiming", "gaussian", "orthogonal")],
    *[pytest.param("linear", {"init": init}, id=init) for init in ("pissa", "olora", "loftq")],
    *[pytest.param(layer, {}, id=layer) for layer in SOME],
    *[pytest.param("linear", OPTIONS[name], id=name) for name in OPTIONS],
    *[pytest.param(layer, {"dropout": 0.5}, id=f"{layer}-dropout") for layer in DROPPING],
]


def life(folder, layer, fields, elsewhere):
    """What a model computes from the injection to the merge, and a second one with the saved adapter."""
    lora, inputs = adapted(layer)
    (model, inputs), (second, _) = model_of(layer), model_of(layer)
    second.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.device("meta") if elsewhere else nullcontext():
        lora = LoraModel(model, LoraConfig(**{"r": 2, "init": "none", "target_modules": ["layer"], **fields}))
        found = {"step": results(model, inputs)}
        model.eval().zero_grad()  # which no optimizer has used
        lora.save_adapter(folder)
        found["saved"] = model(*inputs)
        lora.add_adapter("other", LoraConfig(r=1, target_modules=["layer"]))
        lora.add_adapter("third", LoraConfig(r=2, init="none", target_modules=["layer"]))
        lora.add_weighted_adapter(["other", "third"], [0.5, 0.5], "both", "ties", density=0.5)
        lora.set_adapter(["default", "both"])
        lora.merge_adapter(max_error=1.0)
        found["merged"] = model(*inputs)
        lora.unmerge_adapter()
        lora.merge_and_unload(max_error=1.0, dequantize="quantize" in fields)
        found["for good"] = model(*inputs)
        LoraModel.load_adapter(second.eval(), folder)
        found["loaded"] = second(*inputs)
    return found


@pytest.mark.parametrize(("layer", "fields"), LIVES)
def test_nothing_goes_to_the_default_device(layer, fields, tmp_path):
    """As with `torch.set_default_device("cuda")` and a model on another one; here, where nothing has a value."""
    expected = life(tmp_path / "expected", layer, fields, elsewhere=False)
    torch.testing.assert_close(life(tmp_path / "found", layer, fields, elsewhere=True), expected, rtol=0, atol=0)


CORE = Path(lora_plugins.__file__).parent
RUN_IN_STEPS = ("kernels/**/*.py", "layers/*.py", "variants/*.py", "storages/*.py", "inplace/*.py", "plugins/term.py")
WAITS = frozenset(
    [
        "item",
        "tolist",
        "cpu",
        "cuda",
        "numpy",
        "nonzero",
        "argwhere",
        "is_nonzero",
        "equal",
        "allclose",
        "masked_select",
        "unique",
        "unique_consecutive",
        "synchronize",
        "tensor",
        "as_tensor",
        "asarray",
        "from_numpy",
        "new_tensor",
        "bool",
        "float",
        "int",
    ]
)
"""Calls that read a value or take one over from the host; the last three of a tensor, whose casts are methods."""

ON_THE_HOST = {
    "int(torch.randint(SEEDS, (), device='cpu'))": "the seed of a mask",
    "int(seed)": "likewise, drawn by a compiled graph",
    "float(2 ** self.bits)": "a number",
    "bool(hooks)": "a tuple",
    "bool(is_told.all())": "of an output, which is kept on a CPU only",
    "torch.equal(_sums_of_bits(y), self._sums)": "likewise",
    "bool(noted)": "a list",
    "bool(((value - whole).abs() < _WHOLE).all())": "when a state dict is loaded",
    "int(_sum(parameter))": "when a mode is set, of what was written to",
    "int(total)": "likewise",
    "torch.tensor(places, device=device)": "made where a block begins",
    "torch.tensor([at for places in groups.values() for at in places], device=device)": "likewise",
    "bool(module.__dict__.get(_TRAINING, module.training))": "a flag",
    "bool(difference <= error * raw.abs().max().to(difference))": "of a merged weight, which no step assigns",
}
FACTORIES = frozenset(
    [
        "arange",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "normal",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "tensor",
        "zeros",
    ]
)


def calls(pattern, names):
    """The calls by these names in files of the core, as `file: source`; methods that cast are left out."""
    for path in sorted(CORE.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                casts = name in ("bool", "float", "int") and isinstance(function, ast.Attribute)
                if name in names and not casts:
                    yield f"{path.relative_to(CORE)}: {ast.unparse(node)}", node


@pytest.mark.parametrize("pattern", RUN_IN_STEPS)
def test_no_source_of_a_step_waits(pattern):
    found = [where for where, _ in calls(pattern, WAITS)]
    assert [where for where in found if where.partition(": ")[2] not in ON_THE_HOST] == []


BESIDE = ("testing/", "integrations/", "tasks/")
"""The kit, and what lies in the core's folder only where it is installed."""


def made_anywhere(pattern, names):
    """The factories of torch in files of the core that are called without a device."""
    made = [(where, node) for where, node in calls(pattern, names) if ast.unparse(node).startswith("torch.")]
    assert made
    says = {where for where, node in made if any(keyword.arg == "device" for keyword in node.keywords)}
    return [where for where, _ in made if where not in says]


def test_every_new_tensor_says_where():
    """Else it lands on what `torch.set_default_device` names. The kit leaves that to authors."""
    assert [where for where in made_anywhere("**/*.py", FACTORIES) if not where.startswith(BESIDE)] == []


def test_checks_of_layers_compare_where_the_layer_is():
    """Values are drawn on the CPU, the same for every device; what goes with an output is made beside it."""
    assert made_anywhere("testing/layer_*.py", FACTORIES - {"normal", "rand", "randint", "randn", "randperm"}) == []


def test_float64_is_asked_for_where_it_may_not_be():
    """GPUs of Apple have none: what is made wider goes through one function, which knows them."""
    found = [where.partition(":")[0] for where, _ in calls("**/*.py", {"double"}) if not where.startswith(BESIDE)]
    assert found == ["utils/precision.py"] * 2


def test_own_random_numbers_are_those_of_the_device_too(device):
    """Inside a block they follow from its seed, and after it they go on as they would have."""
    model, drawn = nn.Linear(2, 2).to(device), []
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    for _ in range(2):
        with own_randomness(5, model):
            drawn.append(torch.rand(3, device=device))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(3, device=device), expected)


class ScaledInit(InitPlugin):
    """Draws A in the scale of the weight's columns."""

    name = "scaled"

    def fill(self, context):
        drawn = torch.randn(context.A.shape, generator=context.generator, dtype=context.A.dtype)
        context.A.copy_(drawn * context.weight.std(0))
        context.B.zero_()
        return {}


def test_all_that_an_init_gets_is_in_one_place(device):
    """With --device; that of a third party, to which its tests on the processor say the same."""
    started, registry = [], registry_of(ScaledInit())
    for place in ("cpu", device):
        torch.manual_seed(0)
        model, _ = model_of("linear")
        LoraModel(model.to(place), LoraConfig(r=2, init="scaled", target_modules=["layer"]), registry=registry)
        started.append(model.layer.lora_A["default"].detach().cpu())
    assert torch.equal(*started)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")


@pytest.mark.parametrize(("layer", "fields"), STEPS)
def test_a_device_computes_what_the_processor_does(layer, fields, device):
    """With --device; where that is the processor itself, to the bit."""
    fields = {**fields, "dropout": 0.0}
    lora, inputs = adapted(layer, **fields)
    expected = results(lora.model, inputs)
    moved, _ = adapted(layer, **fields)
    found = results(moved.model.to(device), tuple(x.to(device) for x in inputs))
    assert {tensor.device.type for tensor in found.values()} == {device.type}
    found = {name: tensor.cpu() for name, tensor in found.items()}
    torch.testing.assert_close(found, expected, **({"rtol": 0, "atol": 0} if device.type == "cpu" else TIGHT))


@NEEDS_CUDA
@pytest.mark.parametrize(("layer", "fields"), STEPS)
def test_torch_counts_no_wait(layer, fields):
    lora, inputs = adapted(layer, **fields)
    model, inputs = lora.model.cuda(), tuple(x.cuda() for x in inputs)
    results(model, inputs)  # constants go there, libraries start
    model.zero_grad()
    try:
        torch.cuda.set_sync_debug_mode("error")
        results(model, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
@pytest.mark.parametrize("fields", [{}, {"dropout": 0.5}, {"variant": "dora"}, {"memory": "low"}], ids=str)
def test_a_step_is_captured_in_a_graph(fields):
    lora, inputs = adapted("linear", **fields)
    model, (x,) = lora.model.cuda(), tuple(each.cuda() for each in inputs)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def step():
        for parameter in trained.values():
            parameter.grad = None
        output = model(x)
        output.square().sum().backward()
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step().detach().clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    graph.replay()
    first = output.detach().clone()
    graph.replay()
    if "dropout" in fields:
        assert not torch.equal(output, first)  # a mask of its own for each replay
    else:
        torch.testing.assert_close(output, expected, **TIGHT)
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())


class TwoDevices(nn.Module):
    """Two layers, each where it was put."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x.to(layer.bias.device)).tanh()
        return x


@pytest.mark.parametrize("first_is_beside", [False, True], ids=["second beside", "first beside"])
@pytest.mark.parametrize("init", ["kaiming", "pissa", "eva", "lora_ga"])
def test_a_model_may_be_on_two_devices(init, first_is_beside, device, tmp_path):
    """With --device, on it and the processor."""
    x = torch.randn(5, 4, dtype=torch.float64)
    data = InitData([x], lambda model, batch: model(batch).square().mean())
    config = LoraConfig(r=2, target_modules="all", init=init)

    def made(beside=None):
        torch.manual_seed(0)
        model = TwoDevices().double().eval()
        if beside:
            (model.first if first_is_beside else model.second).to(beside)
        return model

    def outputs(model):
        torch.manual_seed(1)
        lora = LoraModel(model, config, init_data=data if init in ("eva", "lora_ga") else None)
        model.first.lora_B["default"].data.add_(0.5)
        lora.save_adapter(tmp_path / str(id(model)))
        found = [model(x)]
        with lora.disable_adapter():
            found.append(model(x))
        lora.merge_adapter()
        found.append(model(x))
        lora.unmerge_adapter()
        loaded = LoraModel.load_adapter(made(device), tmp_path / str(id(model)))
        return [each.cpu() for each in (*found, model(x), loaded.model(x))]

    torch.testing.assert_close(outputs(made(device)), outputs(made()), **TIGHT)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("layer", [*DROPPING, "embedding"])
def test_half_precision_with_a_scaler(layer, dropout, device):
    """Gradients that are too small for float16 arrive, since the loss is scaled."""
    if dropout and layer not in DROPPING:
        pytest.skip("the layer takes no dropout")
    lora, inputs = adapted(layer, dropout=dropout)
    model = lora.model.float().to(device)
    inputs = tuple((x.float() if x.is_floating_point() else x).to(device) for x in inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    with torch.autocast(device.type, torch.float16):
        loss = model(*inputs).float().mean() * 1e-6
    scaler.scale(loss).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12  # nothing overflowed
    largest = [float(parameter.grad.abs().max()) for parameter in trained]  # not scaled any more
    assert all(0 < value < 1e-5 for value in largest)
