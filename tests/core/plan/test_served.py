"""What a layer type of others answers about a layer is checked before anything is touched, and told by name."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, PluginError, RowMajorPlugin, Slot, TargetError
from tests.core.registries import registry_of


class Pair(nn.Module):
    """Two weights of one shape, a vector, a gap and a child."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4))
        self.second = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.gap = None
        self.child = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.first.T @ self.second.T


class PairPlugin(RowMajorPlugin):
    name = "pair"
    module_type = Pair
    given = (Slot("first"),)

    def slots(self, layer):
        return self.given

    def parts(self, layer):
        return {}


class ThreeDimensions(PairPlugin):
    def to_matrix(self, weight):
        return weight[None]


class NoMatrix(PairPlugin):
    def to_matrix(self, weight):
        return None


class StaysAMatrix(PairPlugin):
    def from_matrix(self, matrix, shape):
        return matrix[:1]


class CannotGoBack(PairPlugin):
    def from_matrix(self, matrix, shape):
        return matrix.view(3, 5)


class Raises(PairPlugin):
    def slots(self, layer):
        return [Slot(layer.nothing)]


class PartsOfOneName(PairPlugin):
    def parts(self, layer):
        return {"q": Slot("first", rows=(0, 2, 4)), "k": Slot("first", rows=(2, 4, 4))}


class PartsOfEachOther(PairPlugin):
    def parts(self, layer):
        return {"q": Slot("first", "k", (0, 2, 4)), "k": Slot("first", "q", (2, 4, 4))}


def giving(*slots):
    return type("PairPlugin", (PairPlugin,), {"given": slots})()


def answering(**answers):
    """Gives an answer for each method."""
    return type("PairPlugin", (PairPlugin,), {name: lambda *_, said=said: said for name, said in answers.items()})()


WRONG = {
    "names": (answering(slots=["first"]), r"slots\(\) gives \('first',\): list slots, \[Slot\('weight'\)\]"),
    "a text": (answering(slots="first"), r"slots\(\) gives 'first': list slots"),
    "one slot": (answering(slots=Slot("first")), r"slots\(\) gives Slot\(.*\): list slots"),
    "no slots": (answering(slots=None), r"slots\(\) gives None: list slots"),
    "a dotted part": (giving(Slot("first", "a.b")), r"the part 'a.b': lora_A_a.b can be no attribute"),
    "rows in a list": (giving(Slot("first", rows=[0, 2, 4])), r"rows=\[0, 2, 4\]: give a tuple"),
    "two rows": (giving(Slot("first", rows=(0, 2))), r"rows=\(0, 2\): give a tuple"),
    "half a row": (giving(Slot("first", rows=(0, 1.5, 4))), r"rows=\(0, 1.5, 4\): give a tuple"),
    "listed parts": (answering(parts=[Slot("first", "q")]), r"parts\(\) gives \[Slot.*\]: map parts to slots"),
    "parts of names": (answering(parts={"q": "first"}), r"parts\(\) gives \('first',\): list slots"),
    "a bias": (answering(biases="bias"), r"biases\(\) gives 'bias': list names"),
    "no biases": (answering(biases=None), r"biases\(\) gives None: list names"),
    "nothing": (giving(), r"slots\(\) names no weight"),
    "one part": (giving(Slot("first"), Slot("second")), r"slots\(\) gives 'first' and 'second' the part ''"),
    "parts of one name": (PartsOfOneName(), r"parts\(\) gives 'first' and 'first' the part ''"),
    "parts of each other": (PartsOfEachOther(), r"parts\(\) gives 'q' a slot whose A and B are named by the part 'k'"),
    "misspelt": (giving(Slot("frist")), r"the weight 'frist', which is none of the layer's own. Did you mean 'first'"),
    "of a child": (giving(Slot("child.weight")), r"names the weight 'child.weight', which is none"),
    "a gap": (giving(Slot("gap")), r"names the weight 'gap', which is none"),
    "a vector": (giving(Slot("vector")), r"to_matrix of 'vector', \(4,\), raised IndexError"),
    "rows beyond": (giving(Slot("first", "q", (2, 6, 8))), r"rows=\(2, 6, 8\), and the matrix of 'first' has 4 rows"),
    "three dimensions": (ThreeDimensions(), r"gives \(1, 4, 4\) and no matrix \(out, in\)"),
    "no matrix": (NoMatrix(), r"gives None and no matrix"),
    "another shape": (StaysAMatrix(), r"from_matrix for 'first', \(4, 4\), gives \(1, 4\) and not that shape"),
    "cannot go back": (CannotGoBack(), r"from_matrix for 'first', \(4, 4\), raised RuntimeError"),
    "raises": (Raises(), r"AttributeError: 'Pair' object has no attribute 'nothing'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_refused_by_the_name_of_layer_and_plugin(name):
    plugin, message = WRONG[name]
    model, registry = nn.Sequential(Pair()), registry_of(plugin)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PluginError, match=message) as caught:
        LoraModel(model, LoraConfig(r=2, target_modules=["0"]), registry=registry)
    assert "layer type 'pair' cannot serve '0', a Pair" in str(caught.value)
    assert type(plugin).__name__ in str(caught.value)
    assert type(model[0]) is Pair
    assert list(model.state_dict()) == list(before)
    LoraModel(model, LoraConfig(r=2, target_modules=["0.child"]), registry=registry)


def test_two_weights_with_a_part_each():
    model = nn.Sequential(Pair()).double()
    lora = LoraModel(
        model,
        LoraConfig(r=2, target_modules=["0"], init="none"),
        registry=registry_of(giving(Slot("first", "a"), Slot("second", "b"))),
    )
    state, x = model.state_dict(), torch.randn(3, 4).double()
    scaling = lora.plans["default"].layers[0].scaling
    weights = [
        state[f"0.{name}"] + scaling * state[f"0.lora_B_{part}.default"] @ state[f"0.lora_A_{part}.default"]
        for name, part in {"first": "a", "second": "b"}.items()
    ]
    torch.testing.assert_close(model(x), x @ weights[0].T @ weights[1].T)


def tied_lstm():
    layer = nn.LSTM(4, 4, 2)
    layer.weight_ih_l1 = layer.weight_ih_l0
    layer.flatten_parameters()
    return layer


def tied_pair():
    layer = Pair()
    layer.second = layer.first
    return layer


@pytest.mark.parametrize(
    ("build", "plugin", "names"),
    [
        (tied_lstm, PairPlugin(), ("weight_ih_l0", "weight_ih_l1")),
        (tied_pair, giving(Slot("first", "a"), Slot("second", "b")), ("first", "second")),
        (tied_pair, PairPlugin(), ("first", "second")),
    ],
    ids=["built in", "both named", "one named"],
)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_parameter_with_two_names_in_one_layer_is_refused(build, plugin, names, quantize):
    model = nn.Sequential(build())
    options = {"min_size": 0} if quantize else {}
    config = LoraConfig(r=2, target_modules=["0"], quantize=quantize, quantize_options=options)
    with pytest.raises(TargetError, match=f"'0': '{names[0]}' is the same parameter as '{names[1]}' of this layer"):
        LoraModel(model, config, registry=registry_of(plugin))


class Normed(nn.Module):
    """A wrapper that takes the weight away and computes it in its forward, as spectral norms of GANs do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        layer.weight_bar = layer.weight
        del layer.weight

    def forward(self, x):
        self.layer.weight = self.layer.weight_bar / self.layer.weight_bar.norm()
        return self.layer(x)


def test_a_weight_that_a_wrapper_computes_is_there_after_a_forward():
    model, x = nn.Sequential(Normed(nn.Linear(4, 4).double())), torch.randn(3, 4).double()
    config = LoraConfig(r=2, init="none")
    with pytest.raises(PluginError, match=r"'weight_bar'\? If a wrapper .* run the model once on a batch"):
        LoraModel(model, config)
    model(x)
    LoraModel(model, config)
    layer = model[0].layer
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    weight = layer.weight_bar / layer.weight_bar.norm() + config.alpha / config.r * B @ A
    torch.testing.assert_close(model(x), x @ weight.T + layer.bias)


@pytest.mark.parametrize("columns", [4, 3], ids=["rows", "rows-and-columns"])
@pytest.mark.parametrize("rows", [9, 10])
def test_a_linear_layer_whose_weight_was_cut_by_hand(rows, columns):
    """As a head for fewer classes: 21 rows have thirds, and they are not those of the weight that is there."""
    model = nn.Sequential(nn.Linear(4, 21, bias=False))
    model[0].weight = nn.Parameter(model[0].weight[:rows, :columns].detach())
    x, lora = torch.randn(2, columns), LoraModel(model, LoraConfig(r=2))
    nn.init.normal_(model[0].lora_B["default"])
    y = model(x)
    assert y.shape == (2, rows)
    lora.merge_and_unload()
    torch.testing.assert_close(model(x), y)


def test_a_layer_that_is_to_be_stored_is_checked_too():
    model = nn.ModuleDict({"pair": Pair(), "linear": nn.Linear(4, 4)})
    config = LoraConfig(
        r=2, target_modules=["linear"], quantize="nf4", quantize_options={"min_size": 0}, quantize_modules="all"
    )
    with pytest.raises(PluginError, match="'pair' cannot serve 'pair', a Pair"):
        LoraModel.plan(model, config, registry=registry_of(Raises()))
