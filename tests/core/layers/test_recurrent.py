"""Recurrent layers: the law through their own kernels, which read the weights from a list."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError, TargetError

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

LAYERS = {
    "lstm": lambda: nn.LSTM(5, 4),
    "lstm-all_options": lambda: nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True, proj_size=3, dropout=0.5),
    "lstm-no_bias": lambda: nn.LSTM(5, 4, 2, bias=False, proj_size=2),
    "gru": lambda: nn.GRU(5, 4, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(5, 4, 2, batch_first=True),
    "rnn-relu": lambda: nn.RNN(5, 4, nonlinearity="relu", bidirectional=True),
}

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}

every_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"rnn": LAYERS[kind]().double()})


def adapt(model: nn.Module, **fields) -> LoraModel:
    return LoraModel(model, LoraConfig(**{"r": 2, "alpha": 5.0, "init": "none", **fields}))


def lawful(base: nn.Module, model: nn.Module) -> nn.Module:
    """The untouched layer with `W + scaling * B @ A` written into each weight."""
    layer, adapted = copy.deepcopy(base)["rnn"], model["rnn"]
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith("weight"):
                suffix = name.removeprefix("weight_")
                A, B = (getattr(adapted, f"lora_{factor}_{suffix}")["default"] for factor in "AB")
                weight.add_(5 / 2 * B @ A)
    return layer


def sequences() -> Tensor:
    return torch.randn(3, 3, 5, dtype=torch.float64)


def outputs(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [result.data] if isinstance(result, nn.utils.rnn.PackedSequence) else [x for y in result for x in outputs(y)]


def state(layer: nn.RNNBase):
    """A first hidden state, and for an LSTM the state of its cells."""
    count, hidden = layer.num_layers * (1 + layer.bidirectional), layer.proj_size or layer.hidden_size
    h = torch.randn(count, 3, hidden, dtype=torch.float64)
    c = torch.randn(count, 3, layer.hidden_size, dtype=torch.float64)
    return (h, c) if isinstance(layer, nn.LSTM) else h


CALLS = {
    "batch": lambda layer: (sequences(),),
    "one_sequence": lambda layer: (sequences()[0],),
    "state": lambda layer: (sequences(), state(layer)),
    "packed": lambda layer: (
        pack_padded_sequence(sequences(), torch.tensor([2, 3, 1]), layer.batch_first, enforce_sorted=False),
        state(layer),
    ),
}


@every_layer
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_law(kind, call, grad, training):
    base = make(kind)
    model = copy.deepcopy(base)
    lora = adapt(model)
    reference = lawful(base.train(training), model.train(training))
    inputs = CALLS[call](model["rnn"])
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        got = outputs(model["rnn"](*inputs))
        torch.manual_seed(1)
        expected = outputs(reference(*inputs))
    torch.testing.assert_close(got, expected, **TIGHT)
    if grad:
        sum(x.square().sum() for x in got).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        slots = [name for name in model["rnn"]._parameters if name.startswith("weight")]
        assert len(trained) == 2 * len(slots)
        assert all(p.grad.abs().max() > 0 for p in trained.values())
    lora.unload()
    torch.manual_seed(1)
    got = outputs(model["rnn"](*inputs))
    torch.manual_seed(1)
    for one, other in zip(got, outputs(base["rnn"](*inputs)), strict=True):
        assert torch.equal(one, other)


@every_layer
def test_finite_differences(kind):
    model = make(kind).eval()
    adapt(model, r=1)
    layer, x = model["rnn"], sequences()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    leaves = tuple(layer.get_parameter(name).detach().clone().requires_grad_() for name in names)

    def run(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), x)[0]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@every_layer
def test_merging_and_unloading(kind):
    base = make(kind).eval().requires_grad_(False)  # torch sums otherwise for weights that require a gradient
    model, x = copy.deepcopy(base), sequences()
    layer, before = model["rnn"], copy.deepcopy(base.state_dict())
    with torch.no_grad():
        untouched = layer(x)[0]
        lora = adapt(model)
        adapted, weights = layer(x)[0], layer._flat_weights
        assert not torch.allclose(adapted, untouched)
        with lora.disable_adapter():
            assert torch.equal(layer(x)[0], untouched)
        lora.merge_adapter()
        torch.testing.assert_close(layer(x)[0], adapted, **TIGHT)
        lora.unmerge_adapter()
        assert all(torch.equal(*pair) for pair in zip(layer._flat_weights, weights, strict=True))
        # Not equal in every bit: the order in which a product is summed up depends on where its matrix lies in memory.
        torch.testing.assert_close(layer(x)[0], adapted, **TIGHT)
        other = copy.deepcopy(model)
        torch.testing.assert_close(LoraModel(other).merge_and_unload()["rnn"](x)[0], adapted, **TIGHT)
        lora.unload()
        assert torch.equal(layer(x)[0], untouched)
    assert type(layer) is type(base["rnn"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_made_between_steps(kind, copied):
    model = make(kind)
    lora = adapt(model)
    model["rnn"](sequences())[0].sum().backward()
    other, x = copied(model.eval()), sequences()
    expected = model["rnn"](x)[0]
    torch.testing.assert_close(other["rnn"](x)[0], expected, rtol=0, atol=0)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_" in name:
                p.zero_()
    assert torch.equal(model["rnn"](x)[0], expected)
    lora.unload()
    assert torch.equal(other["rnn"](x)[0], model["rnn"](x)[0])


@every_layer
def test_nothing_of_a_forward_is_kept(kind):
    model = make(kind)
    adapt(model)
    layer = model["rnn"]
    layer(sequences())
    layer.flatten_parameters()
    model.double()
    assert all(isinstance(weight, nn.Parameter) for weight in layer.__dict__["_flat_weights"])
    layer.__dict__["_flat_weights"] = None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert all(isinstance(weight, nn.Parameter) for weight in layer.__dict__["_flat_weights"])


def test_other_types_and_a_new_base():
    model = make("gru").eval()
    lora = adapt(model)
    base = {key: value + 0.1 for key, value in make("gru").state_dict().items()}
    model.load_state_dict(base)
    reference = make("gru")
    reference.load_state_dict(base)
    x = sequences()
    torch.testing.assert_close(model["rnn"](x)[0], lawful(reference.eval(), model)(x)[0], **TIGHT)
    model.bfloat16()
    assert model["rnn"](x.bfloat16())[0].dtype == torch.bfloat16
    lora.unload()
    assert model["rnn"](x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("read", ["_flat_weights", "all_weights"])
def test_weights_that_another_module_reads_from_the_list(read):
    base = make("lstm")
    model = copy.deepcopy(base)
    adapt(model)
    found, expected = getattr(model["rnn"], read), getattr(lawful(base, model), read)
    if read == "all_weights":
        found, expected = found[0], expected[0]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **TIGHT)


class Remembering(nn.GRU):
    """A subclass with another constructor, which keeps something of each call."""

    def __init__(self) -> None:
        super().__init__(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.flatten_parameters()
        result = super().forward(2 * x)
        self.last = result[0].detach()
        return result


def test_a_subclass():
    base = nn.ModuleDict({"rnn": Remembering().double()})
    model = copy.deepcopy(base)
    lora = adapt(model)
    x = sequences()
    torch.testing.assert_close(model["rnn"](x)[0], lawful(base, model)(x)[0], **TIGHT)
    assert model["rnn"].last.shape == (3, 3, 4)
    lora.unload()
    assert torch.equal(model["rnn"](x)[0], base["rnn"](x)[0])


COMPUTED = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed(kind):
    model, x = make("lstm").eval(), sequences()
    layer = COMPUTED[kind](model["rnn"])
    with torch.no_grad():
        untouched = layer(x)[0]
        lora = adapt(model)
        reference = make("lstm").eval()
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            reference["rnn"].get_parameter(name).copy_(getattr(layer, name))
        adapted = layer(x)[0]
        torch.testing.assert_close(adapted, reference["rnn"](x)[0], **TIGHT)
        assert not torch.allclose(adapted, untouched)
        lora.merge_adapter()
        torch.testing.assert_close(layer(x)[0], adapted, **TIGHT)
        lora.unmerge_adapter()
        lora.unload()
        assert torch.equal(layer(x)[0], untouched)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained(bias):
    model = make("gru")
    adapt(model, bias=bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    assert trained == {f"rnn.{name}" for name in model["rnn"]._parameters if name.startswith("bias")}


def test_what_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(TargetError, match=r"'rnn': LSTM cannot honor dropout=0\.1"):
        adapt(make("lstm"), dropout=0.1)
    with pytest.raises(TargetError, match=r"'rnn': the layer type 'recurrent' does not say"):
        adapt(make("lstm"), init="eva")
    lora = adapt(make("lstm").eval())
    with (
        pytest.raises(StateError, match=r"cannot mix adapters in one batch: 'rnn'"),
        lora.mixed_batch(["default", None]),
    ):
        pass
    with pytest.raises(AdapterFileError, match=r"'rnn'.*recurrent"):
        lora.save_adapter(tmp_path / "peft", format="peft")


def test_ranks_of_layers_and_two_adapters():
    model = nn.ModuleDict({"rnn": nn.LSTM(5, 4), "head": nn.Linear(4, 2)})
    lora = adapt(model, rank_pattern={"rnn": 3})
    assert model["rnn"].lora_A_hh_l0["default"].shape == (3, 4)
    lora.add_adapter("other", LoraConfig(r=1, target_modules=["rnn"]))
    lora.set_adapter("other")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"rnn.lora_{factor}_{which}_l0.other" for factor in "AB" for which in ("ih", "hh")
    }


# Dynamo looks at the gradient of every tensor that goes into what it compiles around the layer, which it leaves alone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_around_the_layer():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model = Model().double()
    adapt(model)
    x = sequences()
    try:
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x), **TIGHT)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    cell = CELLS[kind](5, 4).double()
    model = nn.ModuleDict({"rnn": cell})
    base = copy.deepcopy(model)
    lora = adapt(model)
    h = torch.randn(2, 4, dtype=torch.float64)
    x, h = torch.randn(2, 5, dtype=torch.float64), (h, h) if kind == "lstm" else h
    torch.testing.assert_close(outputs(cell(x, h)), outputs(lawful(base, model)(x, h)), **TIGHT)
    sum(outputs(cell(x, h))).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    lora.unload()
    assert torch.equal(outputs(cell(x, h))[0], outputs(base["rnn"](x, h))[0])
