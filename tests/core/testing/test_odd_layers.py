"""The layer kit on layers that take and give their tensors in other ways than one by one."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins import ColumnMajorPlugin, LayerPlugin, PluginError, RowMajorPlugin, Slot
from lora_plugins.testing import CheckError, check_layer_plugin


@dataclass
class Answer:
    logits: Tensor
    width: int


class Odd(nn.Module):
    """y = x Wᵀ, of a dictionary and in an object."""

    def __init__(self, answer=Answer, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=dtype))
        self.answer = answer

    def forward(self, batch):
        return self.answer(logits=F.linear(batch["x"], self.weight), width=5)


class OddPlugin(RowMajorPlugin):
    name = "odd"
    module_type = Odd

    def biases(self, layer):
        return []


class WrongPlugin(OddPlugin):
    """Computes something else where it has a branch."""

    branch_types = (Odd,)
    branch_use = "always"

    def branch(self, layer, base, terms, batch):
        return Answer(F.linear(batch["x"], base["weight"]), 5)


class Computed(Odd):
    """Has a weight that it computes at each read."""

    kernel = property(lambda layer: 2 * layer.weight)


class ComputedPlugin(OddPlugin):
    module_type = Computed

    def slots(self, layer):
        return [Slot("kernel")]


class Buffered(Odd):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.randn(4, 5))


class BufferedPlugin(ComputedPlugin):
    module_type = Buffered


class Coded(nn.Module):
    """Computes its weight from codes alone."""

    kernel = property(lambda layer: layer.codes / 2)

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-9, 9, (4, 5)))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, batch):
        return F.linear(batch["x"], self.kernel, self.bias)


class CodedPlugin(RowMajorPlugin):
    name = "coded"
    module_type = Coded

    def slots(self, layer):
        return [Slot("kernel")]


class OfAChild(nn.Module):
    """Finds the weight of a child as its own."""

    def __init__(self):
        super().__init__()
        self.inner = Odd()

    def __getattr__(self, name):
        return self.inner.weight if name == "kernel" else super().__getattr__(name)

    def forward(self, batch):
        return F.linear(batch["x"], self.kernel)


class OfAChildPlugin(ComputedPlugin):
    module_type = OfAChild


def no_numbers(logits, width):
    return logits / 0


class SlotsOfOneName(OddPlugin):
    def slots(self, layer):
        return [Slot("weight"), Slot("weight")]


def check(plugin, only=None, **options):
    check_layer_plugin(plugin, Odd, lambda layer: ({"x": torch.randn(3, 5)},), [options], only=only)


@pytest.mark.parametrize("answer", [Answer, dict], ids=["dataclass", "dictionary"])
def test_a_layer_of_a_dictionary_passes(answer):
    check(OddPlugin(), answer=answer)


def test_what_a_dataclass_holds_is_compared():
    with pytest.raises(CheckError, match="the output in eval mode"):
        check(WrongPlugin(), only=["law"])


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        (OddPlugin(), {"answer": SimpleNamespace}, "the layer gives a SimpleNamespace, and the kit looks for tensors"),
        (OddPlugin(), {"dtype": torch.cfloat}, r"'weight' has the type torch.complex64, not a floating one"),
        (SlotsOfOneName(), {}, r"slots\(\) gives 'weight' and 'weight' the part ''"),
        (ComputedPlugin(), {}, r"slots\(\) names 'kernel', a property .* a slot for each\. There is 'weight'\."),
        (CodedPlugin(), {}, r"slots\(\) names 'kernel', a property .* a slot for each\. There are none\."),
        (OfAChildPlugin(), {}, "names the weight 'kernel', which is none .* belongs to their layer types"),
        (BufferedPlugin(), {}, r"slots\(\) names 'kernel', a buffer .* A weight is a parameter of the layer"),
        (OddPlugin(), {"answer": no_numbers}, "the untouched layer gives no finite number"),
    ],
    ids=["no tensors", "complex", "one part", "computed", "coded", "of a child", "a buffer", "no numbers"],
)
def test_what_cannot_be_checked_is_told_first(plugin, options, message):
    with pytest.raises(CheckError, match=message) as caught:
        check_layer_plugin(plugin, plugin.module_type, lambda layer: ({"x": torch.randn(3, 5)},), [options])
    assert caught.value.check == "registration"


class Turned(nn.Linear):
    """Turns its outputs by complex phases, and has an extra state that is no tensor but holds one."""

    def __init__(self):
        super().__init__(5, 4)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
        self.settings = {"steps": 3, "seen": torch.zeros(2)}

    def get_extra_state(self):
        return self.settings

    def set_extra_state(self, state):
        self.settings = state

    def forward(self, x):
        return torch.view_as_real(super().forward(x) * self.phase)


class TurnedPlugin(RowMajorPlugin):
    name = "turned"
    module_type = Turned


def test_a_layer_of_complex_parameters_beside_its_weight_and_of_an_extra_state_passes():
    check_layer_plugin(TurnedPlugin(), Turned, lambda layer: torch.randn(3, 5))


class Spectrum(nn.Linear):
    def __init__(self):
        super().__init__(5, 4)

    def forward(self, x):
        return torch.fft.fft(super().forward(x))


class SpectrumPlugin(RowMajorPlugin):
    name = "spectrum"
    module_type = Spectrum


@pytest.mark.slow
def test_a_layer_of_complex_outputs_passes():
    check_layer_plugin(SpectrumPlugin(), Spectrum, lambda layer: torch.randn(3, 5))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, *, x, factor=1.0):
        return {"y": F.linear(x, self.weight) * factor}


class ByKeywordPlugin(RowMajorPlugin):
    name = "by_keyword"
    module_type = ByKeyword
    branch_types = (ByKeyword,)
    branch_use = "always"

    def slots(self, layer):
        return (Slot(name) for name in ("weight",))  # an iterator does as well

    def biases(self, layer):
        return []

    def inputs(self, layer, slot, *, x, factor=1.0):
        return x * factor

    def branch(self, layer, base, terms, *, x, factor=1.0):
        y = F.linear(x, base["weight"])
        for term in terms:
            low = F.linear(term.drop(x).to(term.A.dtype), term.A)
            y = y + (term.scaling * F.linear(low, term.B)).to(y.dtype)
        return {"y": y * factor}


class DropsEverything(ByKeywordPlugin):
    def branch(self, layer, base, terms, *, x, factor=1.0):
        return super().branch(layer, base, terms, x=terms[0].drop(x), factor=factor)


def by_keyword(layer):
    return {"x": torch.randn(5, 4), "factor": 1.5}


def test_a_layer_of_keywords_alone_passes():
    check_layer_plugin(ByKeywordPlugin(), ByKeyword, by_keyword)


def test_a_layer_of_keywords_alone_is_checked():
    with pytest.raises(CheckError, match="the check 'dropout'"):
        check_layer_plugin(DropsEverything(), ByKeyword, by_keyword)


@pytest.mark.parametrize("inputs", [torch.ones(5, 4), (torch.ones(5, 4),)], ids=["tensor", "tuple"])
def test_inputs_of_a_layer_of_keywords_alone_need_names(inputs):
    with pytest.raises(CheckError, match="takes x by keyword alone, and its inputs have no names; give them all in"):
        check_layer_plugin(ByKeywordPlugin(), ByKeyword, lambda layer: inputs)


class HalfByKeyword(ByKeyword):
    def forward(self, x, *, scale, shift=0.0):
        return super().forward(x=x * scale)["y"] + shift


class HalfByKeywordPlugin(ByKeywordPlugin):
    name = "half_by_keyword"
    module_type = HalfByKeyword
    branch_types = (HalfByKeyword,)

    def inputs(self, layer, slot, x, *, scale, shift=0.0):
        return x * scale

    def branch(self, layer, base, terms, x, *, scale, shift=0.0):
        return super().branch(layer, base, terms, x=x * scale)["y"] + shift


class LosesTheShift(HalfByKeywordPlugin):
    def branch(self, layer, base, terms, x, *, scale, shift=0.0):
        return super().branch(layer, base, terms, x, scale=scale)


def half_by_keyword(layer):
    return {"x": torch.randn(5, 4), "scale": torch.rand(5, 1), "shift": 0.5}


def test_a_layer_of_some_keywords_passes():
    check_layer_plugin(HalfByKeywordPlugin(), HalfByKeyword, half_by_keyword)


def test_a_layer_of_some_keywords_is_checked():
    with pytest.raises(CheckError, match="the check 'law'"):
        check_layer_plugin(LosesTheShift(), HalfByKeyword, half_by_keyword)


def test_inputs_of_a_layer_of_some_keywords_need_names():
    with pytest.raises(CheckError, match="takes scale by keyword alone, and its inputs have no names"):
        check_layer_plugin(HalfByKeywordPlugin(), HalfByKeyword, lambda layer: torch.randn(5, 4))


class KeywordsThatNeedNotBe(HalfByKeyword):
    def forward(self, x, *, scale=1.0, shift=0.0):
        return super().forward(x, scale=scale, shift=shift)


@pytest.mark.slow
def test_a_layer_whose_keywords_have_defaults_takes_inputs_without_names():
    class OfDefaults(ByKeywordPlugin):
        name = "of_defaults"
        module_type = KeywordsThatNeedNotBe
        branch_use = "never"
        inputs = RowMajorPlugin.inputs

    check_layer_plugin(OfDefaults(), KeywordsThatNeedNotBe, lambda layer: torch.randn(5, 4), skip=["pickle"])


class Counting(nn.Module):
    """A frozen layer with a normalization in it, which counts its calls and gives its output last."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.training
        return x.argmax(-1), x.sum(-1), self.norm(F.linear(x, self.weight))


class CountingPlugin(RowMajorPlugin):
    name = "counting"
    module_type = Counting
    branch_types = (Counting,)
    branch_use = "dropout"

    def biases(self, layer):
        return []

    def branch(self, layer, base, terms, x):
        layer.calls += layer.training
        y = F.linear(x, base["weight"])
        for term in terms:
            low = F.linear(term.drop(x).to(term.A.dtype), term.A)
            y = y + (term.scaling * F.linear(low, term.B)).to(y.dtype)
        return x.argmax(-1), x.sum(-1), layer.norm(y)


@pytest.mark.slow
def test_a_layer_that_counts_its_calls_and_has_a_norm_passes():
    check_layer_plugin(CountingPlugin(), Counting, lambda layer: torch.randn(5, 4))


class AlwaysCounting(nn.Module):
    """Counts its calls in evaluation too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.weight)


class AlwaysCountingPlugin(RowMajorPlugin):
    name = "always_counting"
    module_type = AlwaysCounting


@pytest.mark.slow
def test_a_layer_that_counts_its_calls_in_evaluation_passes():
    check_layer_plugin(AlwaysCountingPlugin(), AlwaysCounting, lambda layer: torch.randn(5, 4))


class Unmade(Odd):
    """Makes its weight in the first call."""

    def __init__(self):
        super().__init__()
        self.weight = None


def test_a_weight_that_is_none_is_not_offered_in_its_own_place():
    with pytest.raises(CheckError, match=r"names the weight 'weight', which the layer does not have\. There are none"):
        check_layer_plugin(OddPlugin(), Unmade, lambda layer: torch.randn(2, 4), only=["layout"])


class Glu(nn.Module):
    """y = sigmoid(G x + b) * U x: two weights, and one of them inside a curve."""

    def __init__(self, bias=True):
        super().__init__()
        self.gate, self.up = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x):
        return torch.sigmoid(F.linear(x, self.gate, self.bias)) * F.linear(x, self.up)


class DropsInputs(RowMajorPlugin):
    """Drops what goes into the weight of a term."""

    def low(self, term, x):
        return F.linear(term.drop(x).to(term.A.dtype), term.A)


class GluPlugin(DropsInputs):
    name = "glu"
    module_type = Glu
    branch_types = (Glu,)
    branch_use = "always"

    def slots(self, layer):
        return [Slot("gate", "gate"), Slot("up", "up")]

    def inputs(self, layer, slot, x):
        return x.flatten(0, -2)

    def branch(self, layer, base, terms, x):
        y = {"gate": F.linear(x, base["gate"], layer.bias), "up": F.linear(x, base["up"])}
        for term in terms:
            low = self.low(term, x)
            y[term.slot.tensor] = y[term.slot.tensor] + (term.scaling * F.linear(low, term.B)).to(y["up"].dtype)
        return torch.sigmoid(y["gate"]) * y["up"]


class DropsForOneSlot(GluPlugin):
    def low(self, term, x):
        return super().low(term, x) if term.slot.tensor == "gate" else F.linear(x.to(term.A.dtype), term.A)


class DropsTheMiddle(GluPlugin):
    def low(self, term, x):
        return term.drop(F.linear(x.to(term.A.dtype), term.A))


@pytest.mark.slow
def test_a_layer_of_two_weights_inside_a_curve_passes():
    check_layer_plugin(GluPlugin(), Glu, lambda layer: torch.randn(5, 4), [{}, {"bias": False}])


@pytest.mark.parametrize("plugin", [DropsForOneSlot(), DropsTheMiddle()], ids=lambda plugin: type(plugin).__name__)
def test_dropout_of_one_weight_of_two_is_checked(plugin):
    with pytest.raises(CheckError, match="fails the check 'dropout'"):
        check_layer_plugin(plugin, Glu, lambda layer: torch.randn(5, 4))


class Mlp(nn.Module):
    """y = U tanh(D x): two weights, of which one is fed by the other; it keeps how long its input was."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        self.length = len(x)
        return F.linear(torch.tanh(F.linear(x, self.down)), self.up)


class MlpPlugin(DropsInputs):
    name = "mlp"
    module_type = Mlp
    branch_types = (Mlp,)
    branch_use = "dropout"

    def slots(self, layer):
        return [Slot("down", "down"), Slot("up", "up")]

    def branch(self, layer, base, terms, x):
        for name in ("down", "up"):
            y = F.linear(x, base[name])
            for term in (term for term in terms if term.slot.tensor == name):
                y = y + (term.scaling * F.linear(self.low(term, x), term.B)).to(y.dtype)
            x = torch.tanh(y)
        return y


class DropsTheMiddleOfTheFirst(MlpPlugin):
    def low(self, term, x):
        low = F.linear(x.to(term.A.dtype), term.A)
        return term.drop(low) if term.slot.tensor == "down" else super().low(term, x)


@pytest.mark.slow
def test_a_layer_whose_weights_feed_each_other_passes():
    check_layer_plugin(MlpPlugin(), Mlp, lambda layer: torch.randn(5, 4))


def test_dropout_of_the_weight_that_is_fed_by_the_input_is_checked():
    with pytest.raises(CheckError, match="fails the check 'dropout'"):
        check_layer_plugin(DropsTheMiddleOfTheFirst(), Mlp, lambda layer: torch.randn(5, 4))


class DropsAllChannelsTogether(RowMajorPlugin):
    name = "together"
    module_type = nn.Conv1d
    branch_types = (nn.Conv1d,)
    branch_use = "dropout"

    def branch(self, layer, base, terms, x):
        y = layer._conv_forward(x, base["weight"], layer.bias)
        for term in terms:
            kernel = (term.scaling * term.B @ term.A).view_as(base["weight"]).to(x)
            y = y + layer._conv_forward(x * term.drop(torch.ones_like(x[:, :1, :1])), kernel, None)
        return y


@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"groups": 4, "padding": 1}], ids=str)
def test_dropout_of_channels_that_do_not_meet_is_checked(options):
    sizes = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    with pytest.raises(CheckError, match="always dropped together"):
        check_layer_plugin(
            DropsAllChannelsTogether(),
            nn.Conv1d,
            lambda layer: torch.randn(2, 4, 5),
            [sizes | options],
            only=["dropout"],
        )


class Factored(nn.Module):
    """y = U V x + b: what the bias is added to is no product with V alone."""

    def __init__(self):
        super().__init__()
        self.V, self.U = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return F.linear(F.linear(x, self.V), self.U, self.bias)


class FactoredPlugin(RowMajorPlugin):
    name = "factored"
    module_type = Factored

    def slots(self, layer):
        return [Slot("V", "v"), Slot("U", "u")]

    def inputs(self, layer, slot, x):
        return x if slot.tensor == "V" else F.linear(x, layer.V)


class FeedsBothTheSame(FactoredPlugin):
    def inputs(self, layer, slot, x):
        return x if slot.tensor == "V" else x[:, :3]


def test_a_layer_of_a_weight_in_two_factors_and_a_bias_passes():
    check_layer_plugin(FactoredPlugin(), Factored, lambda layer: torch.randn(7, 4))


def test_what_goes_into_the_second_factor_is_checked():
    with pytest.raises(CheckError, match="fails the check 'inputs'"):
        check_layer_plugin(FeedsBothTheSame(), Factored, lambda layer: torch.randn(7, 4))


class Equalized(nn.Module):
    """y = W (x / 2) + b / 100: weights and biases learn at rates of their own, as in StyleGAN."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias * 0.01)


class EqualizedPlugin(RowMajorPlugin):
    name = "equalized"
    module_type = Equalized

    def inputs(self, layer, slot, x):
        return x * 0.5


class ForgetsTheFactor(EqualizedPlugin):
    def inputs(self, layer, slot, x):
        return x


@pytest.mark.slow
def test_a_layer_that_scales_its_bias_apart_passes():
    check_layer_plugin(EqualizedPlugin(), Equalized, lambda layer: torch.randn(7, 4))


def test_a_factor_of_the_weight_is_one_of_its_inputs():
    with pytest.raises(CheckError, match=r"an output has 0\.5 times a vector of inputs"):
        check_layer_plugin(ForgetsTheFactor(), Equalized, lambda layer: torch.randn(7, 4), only=["inputs"])


class RarelyPlugin(GluPlugin):
    """Has its branch replace the layer's own forward only where dropout acts."""

    branch_use = "dropout"


class RarelyWithoutGradient(RarelyPlugin):
    def low(self, term, x):
        return super().low(term, x.detach())


class RarelyInItsOwnType(RarelyPlugin):
    def branch(self, layer, base, terms, x):
        return super().branch(layer, base, terms, x).to(x.dtype)


@pytest.mark.slow
def test_a_branch_for_dropout_alone_passes():
    check_layer_plugin(RarelyPlugin(), Glu, lambda layer: torch.randn(5, 4))


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (RarelyWithoutGradient(), "the gradient of an input differs"),
        (RarelyInItsOwnType(), "with its branch in each call fails the check 'dtype'"),
    ],
    ids=["gradients", "dtype"],
)
def test_a_branch_for_dropout_alone_is_checked_as_any_other(plugin, said):
    with pytest.raises(CheckError, match=said):
        check_layer_plugin(plugin, Glu, lambda layer: torch.randn(5, 4))


class BagPlugin(ColumnMajorPlugin):
    """A layer whose gradients are sparse, unless its class says otherwise while it is adapted."""

    name = "embedding_bag"
    module_type = nn.EmbeddingBag
    lookup = True
    class_attributes = {"sparse": property(lambda layer: False)}  # noqa: RUF012

    def biases(self, layer):
        return []


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "sparse"])
def test_a_layer_of_sparse_gradients_passes(sparse):
    def bags(layer):
        return torch.tensor([[0, 1, 1], [6, 4, 2]])

    check_layer_plugin(
        BagPlugin(), nn.EmbeddingBag, bags, [{"num_embeddings": 7, "embedding_dim": 4, "sparse": sparse}]
    )


class Factorized(nn.Module):
    """A table of few columns, and a projection of its rows."""

    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(3, 5))

    def forward(self, index):
        return F.embedding(index, self.table) @ self.up


class FactorizedPlugin(ColumnMajorPlugin):
    name = "factorized"
    module_type = Factorized
    lookup = True

    def slots(self, layer):
        return [Slot("table", "table"), Slot("up", "up")]

    def biases(self, layer):
        return []


def test_a_table_whose_rows_are_projected_passes():
    check_layer_plugin(FactorizedPlugin(), Factorized, lambda layer: torch.tensor([[0, 1], [6, 4]]))


class OnGraph(nn.Module):
    """y = A x W + b, of a graph's adjacency A, sparse, that it is called with or holds."""

    def __init__(self, adjacency=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.register_buffer("adjacency", adjacency)

    def forward(self, x, adjacency=None):
        return torch.sparse.mm(self.adjacency if adjacency is None else adjacency, x @ self.weight) + self.bias


class OnGraphPlugin(ColumnMajorPlugin):
    name = "on_graph"
    module_type = OnGraph
    branch_types = (OnGraph,)
    branch_use = "always"
    branch_takes_delta = True

    def inputs(self, layer, slot, x, adjacency=None):
        return torch.sparse.mm(layer.adjacency if adjacency is None else adjacency, x)

    def branch(self, layer, base, terms, x, adjacency=None):
        y = x @ base["weight"]
        for term in terms:
            delta = term.scaling * term.B @ term.A if term.delta is None else term.delta
            y = y + F.linear(term.drop(x).to(delta.dtype), delta).to(y.dtype)
        return torch.sparse.mm(layer.adjacency if adjacency is None else adjacency, y) + layer.bias


ADJACENCY = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.0, 1.0]]).to_sparse()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # torch 2.11
@pytest.mark.parametrize("held", [False, True], ids=["called with", "held"])
def test_a_layer_of_a_sparse_tensor_passes(held):
    def nodes(layer):
        return torch.randn(3, 4) if held else (torch.randn(3, 4), ADJACENCY)

    check_layer_plugin(OnGraphPlugin(), OnGraph, nodes, [{"adjacency": ADJACENCY if held else None}])


class Following(nn.Linear):
    """Divides its weight by a norm that it follows from step to step, as spectral normalization does."""

    def __init__(self, width):
        super().__init__(width, width)
        self.register_buffer("u", F.normalize(torch.ones(width), dim=0))

    def forward(self, x):
        with torch.no_grad():
            v = F.normalize(self.weight.T @ self.u, dim=0)
            u = F.normalize(self.weight @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        return F.linear(x, self.weight / (u @ self.weight @ v), self.bias)


class FollowingPlugin(RowMajorPlugin):
    name = "following"
    module_type = Following


def test_a_layer_that_moves_what_it_computes_with_passes():
    check_layer_plugin(FollowingPlugin(), lambda: Following(4), lambda layer: torch.randn(3, 4))


class Masked(nn.Module):
    """Scores by head, of which some are masked, and their mean, which is NaN where there are no rows."""

    def __init__(self, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))
        self.shift = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x):
        y = F.linear(x, self.weight.flatten(0, 1), self.shift)
        return y.masked_fill(x[..., :1] > 0, -torch.inf), y.mean()


class MaskedPlugin(LayerPlugin):
    name = "masked"
    module_type = Masked

    def to_matrix(self, weight):
        return weight.flatten(0, 1)

    def from_matrix(self, matrix, shape):
        return matrix.reshape(shape)

    def biases(self, layer):
        return ["shift"]

    def inputs(self, layer, slot, x):
        if layer.shift is None:
            raise NotImplementedError("unknown without a shift")
        return x.flatten(0, -2)


class MaskedWrongly(MaskedPlugin):
    branch_types = (Masked,)
    branch_use = "always"

    def branch(self, layer, base, terms, x):
        weight = base["weight"].flatten(0, 1) + sum(term.delta_weight() for term in terms)
        y = F.linear(x, weight.to(x), layer.shift)
        return y.masked_fill(x[..., :1] > 0, torch.inf), y.mean()


@pytest.mark.slow
def test_a_layer_that_gives_nan_and_infinities_and_says_none_for_its_bias_passes():
    check_layer_plugin(MaskedPlugin(), Masked, lambda layer: torch.randn(5, 4), [{}, {"bias": False}])


def test_infinities_are_compared():
    with pytest.raises(CheckError, match=r"the output in eval mode, .*, differs by up to inf"):
        check_layer_plugin(MaskedWrongly(), Masked, lambda layer: torch.randn(5, 4), only=["law"])


class Balanced(Odd):
    """Gives a mean over rows of which there are none, so that its gradient is NaN."""

    def forward(self, x):
        y = F.linear(x, self.weight)
        chosen = x[:, :1] > 9
        return y, (y * chosen).sum() / chosen.sum()


class BalancedPlugin(RowMajorPlugin):
    name = "balanced"
    module_type = Balanced


def test_a_gradient_that_is_nan_everywhere_proves_nothing():
    with pytest.raises(CheckError, match=r"the gradient of \S*A\S* is no finite number anywhere"):
        check_layer_plugin(BalancedPlugin(), Balanced, lambda layer: torch.randn(3, 5), only=["gradients"])


class Attention(nn.Module):
    """Attention whose scores are large, so that it is another one where its weights are rounded otherwise."""

    def __init__(self, skip):
        super().__init__()
        torch.randn(skip)
        self.weight = nn.Parameter(torch.randn(24, 8))

    def forward(self, x):
        q, k, v = F.linear(x, self.weight).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class AttentionPlugin(RowMajorPlugin):
    name = "attention_of_one_weight"
    module_type = Attention


@pytest.mark.parametrize("skip", [0, 4])
def test_a_layer_that_no_rounding_may_move_passes_in_half_precision(skip):
    options = [{"skip": skip}]
    check_layer_plugin(AttentionPlugin(), Attention, lambda layer: torch.randn(2, 5, 8), options, only=["dtype"])


class Cell(nn.Module):
    """A recurrent step that is given its state in a dictionary."""

    def __init__(self):
        super().__init__()
        self.weight_x, self.weight_h = (nn.Parameter(torch.randn(4, 4) / 2) for _ in range(2))

    def forward(self, x, state):
        return F.linear(x, self.weight_x) + F.linear(state["h"], self.weight_h)


class CellPlugin(RowMajorPlugin):
    name = "cell"
    module_type = Cell
    branch_types = (Cell,)
    branch_use = "always"

    def slots(self, layer):
        return [Slot("weight_x", "x"), Slot("weight_h", "h")]

    def biases(self, layer):
        return ()

    def inputs(self, layer, slot, x, state):
        vectors = {"x": x, "h": state["h"]}[slot.part]
        return vectors.reshape(-1, vectors.shape[-1])

    def branch(self, layer, base, terms, x, state):
        y = F.linear(x, base["weight_x"]) + F.linear(state["h"], base["weight_h"])
        for term in terms:
            dropped = term.drop({"x": x, "h": state["h"]}[term.slot.part]).to(term.A.dtype)
            y = y + (term.scaling * F.linear(F.linear(dropped, term.A), term.B)).to(y.dtype)
        return y


class DetachesTheState(CellPlugin):
    def branch(self, layer, base, terms, x, state):
        return super().branch(layer, base, terms, x, {"h": state["h"].detach()})


class WritesTheState(CellPlugin):
    def branch(self, layer, base, terms, x, state):
        y = super().branch(layer, base, terms, x, state)
        with torch.no_grad():
            state["h"].copy_(y)
        return y


class DropsColumnsOfTheState(CellPlugin):
    def branch(self, layer, base, terms, x, state):
        if terms[0].dropout:
            kept = F.dropout(torch.ones_like(state["h"][:1]), terms[0].dropout)
            state = {"h": state["h"] * kept}
        return super().branch(layer, base, terms, x, state)


def check_cell(plugin, only=None):
    def inputs(layer):
        return torch.randn(3, 4), {"h": torch.randn(3, 4)}

    check_layer_plugin(plugin, Cell, inputs, only=only)


def test_a_layer_that_is_given_a_dictionary_beside_its_input_passes():
    check_cell(CellPlugin())


@pytest.mark.parametrize(
    ("plugin", "name", "said"),
    [
        (DetachesTheState(), "gradients", "the gradient of an input differs"),
        (WritesTheState(), "pure", "changes .*'the input 1'"),
        (DropsColumnsOfTheState(), "dropout", "an update of zero differs"),
    ],
    ids=["detached", "written to", "dropped"],
)
def test_what_a_dictionary_of_inputs_holds_is_checked(plugin, name, said):
    with pytest.raises(CheckError, match=said):
        check_cell(plugin, only=[name])


class Halving(Odd):
    """Writes to its input."""

    def forward(self, x):
        with torch.no_grad():
            x.mul_(0.5)
        return F.linear(x, self.weight)


class HalvingPlugin(RowMajorPlugin):
    name = "halving"
    module_type = Halving


class Recording(Odd):
    """Keeps its last output."""

    def forward(self, x):
        self.last = F.linear(x, self.weight)
        return self.last


class RecordingPlugin(RowMajorPlugin):
    name = "recording"
    module_type = Recording
    branch_types = (Recording,)
    branch_use = "always"

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"])
        for term in terms:
            y = y + (term.scaling * F.linear(F.linear(term.drop(x).to(term.A.dtype), term.A), term.B)).to(y.dtype)
        layer.last = y
        return y


class KeepsMore(RecordingPlugin):
    def branch(self, layer, base, terms, x):
        layer.last_input = x + 0
        return super().branch(layer, base, terms, x)


@pytest.mark.parametrize("plugin", [HalvingPlugin(), RecordingPlugin()], ids=["writes its input", "keeps its output"])
def test_what_an_untouched_layer_does_beside_its_output_an_adapted_one_may_do(plugin):
    check_layer_plugin(plugin, plugin.module_type, lambda layer: torch.randn(3, 5), skip=["deepcopy"])


def test_what_is_kept_beyond_what_an_untouched_layer_keeps_is_found():
    with pytest.raises(CheckError, match="a call leaves 2 tensors in memory instead of 1"):
        check_layer_plugin(KeepsMore(), Recording, lambda layer: torch.randn(3, 5), only=["pure"])


class Centered(nn.Module):
    """Computes with the centered rows of its weight, which it keeps in eval mode until train() is called."""

    def __init__(self, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(4)) if bias else None
        self.kept = None

    def centered(self):
        return self.weight - self.weight.mean(1, keepdim=True)

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return F.linear(x, self.centered(), self.bias)
        if self.kept is None:
            self.kept = self.centered().detach()
        return F.linear(x, self.kept, self.bias)


def ignored(layer, value):
    """A setter."""


def keep(layer):
    vars(layer)["kept"] = layer.centered().detach()
    return vars(layer)["kept"]


class CenteredPlugin(RowMajorPlugin):
    name = "centered"
    module_type = Centered
    class_attributes = {"kept": property(lambda layer: layer.centered().detach(), ignored)}  # noqa: RUF012

    def forget(self, layer):
        layer.kept = None


class CenteredInputs(CenteredPlugin):
    def inputs(self, layer, slot, x):
        return x - x.mean(1, keepdim=True)


class CenteredByColumns(CenteredPlugin):
    to_matrix, from_matrix = ColumnMajorPlugin.to_matrix, ColumnMajorPlugin.from_matrix


class CenteredDoubleInputs(CenteredInputs):
    def inputs(self, layer, slot, x):
        return 2 * super().inputs(layer, slot, x)


class CenteredWithoutBiases(CenteredPlugin):
    def biases(self, layer):
        return ()


class KeepsCentered(CenteredPlugin):
    class_attributes = {}  # noqa: RUF012


class KeepsCenteredAfterwards(CenteredPlugin):
    class_attributes = {"kept": property(keep, ignored)}  # noqa: RUF012
    forget = RowMajorPlugin.forget


class KeepsCenteredOfBefore(CenteredPlugin):
    forget = RowMajorPlugin.forget


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_keeps_what_it_computes_from_its_weight_passes(bias):
    check_layer_plugin(CenteredInputs(), lambda: Centered(bias), lambda layer: torch.randn(3, 5))


@pytest.mark.parametrize(
    ("plugin", "name"),
    [(CenteredByColumns(), "rows"), (CenteredDoubleInputs(), "inputs"), (CenteredWithoutBiases(), "biases")],
    ids=["rows", "inputs", "biases"],
)
@pytest.mark.parametrize("answer", [lambda y: y, torch.Tensor.detach], ids=["weight", "output"])
def test_answers_of_a_layer_without_gradients_in_eval_mode_are_checked(monkeypatch, plugin, name, answer):
    forward = Centered.forward

    def evaluated(layer, x):
        return answer(forward(layer, x))

    monkeypatch.setattr(Centered, "forward", lambda self, x: (forward if self.training else evaluated)(self, x))
    with pytest.raises(CheckError, match=f"fails the check '{name}'(?s:.*)usual cause"):
        check_layer_plugin(plugin, Centered, lambda layer: torch.randn(3, 5), only=[name])


class Evaluated(nn.Linear):
    """Gives classes in eval mode, which have no gradient."""

    def forward(self, x):
        output = super().forward(x)
        return output if self.training else output.argmax(-1)


class EvaluatedPlugin(RowMajorPlugin):
    name = "evaluated"
    module_type = Evaluated

    def inputs(self, layer, slot, x):
        return x


def test_a_layer_whose_output_in_eval_mode_has_no_gradient_passes():
    check_layer_plugin(EvaluatedPlugin(), lambda: Evaluated(5, 4), lambda layer: torch.randn(3, 5))


@pytest.mark.parametrize(
    ("plugin", "name"),
    [(KeepsCentered(), "pure"), (KeepsCenteredAfterwards(), "unload"), (KeepsCenteredOfBefore(), "merge")],
    ids=["while it is adapted", "after unloading", "after merging"],
)
def test_what_a_layer_keeps_of_its_weight_is_found(plugin, name):
    with pytest.raises(CheckError, match=f"fails the check '{name}'(?s:.*)or the layer keeps what it compute"):
        check_layer_plugin(plugin, Centered, lambda layer: torch.randn(3, 5), only=[name])


class Named(Odd):
    """Gives a dictionary of its output and of how many rows that has."""

    def forward(self, x):
        return {"y": F.linear(x, self.weight), "rows": len(x)}


class NamedPlugin(RowMajorPlugin):
    name = "named"
    module_type = Named
    branch_types = (Named,)
    branch_use = "always"

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"])
        for term in terms:
            y = y + (term.scaling * F.linear(F.linear(term.drop(x).to(term.A.dtype), term.A), term.B)).to(y.dtype)
        return self.form(y)

    def form(self, y):
        return {"y": y, "rows": len(y)}


class GivesATuple(NamedPlugin):
    def form(self, y):
        return y, len(y)


class GivesAnotherName(NamedPlugin):
    def form(self, y):
        return {"z": y, "rows": len(y)}


class GivesAnotherNumber(NamedPlugin):
    def form(self, y):
        return {"y": y, "rows": len(y) + 1}


class GivesMore(NamedPlugin):
    def form(self, y):
        return {**super().form(y), "scaling": 1.0}


def test_a_branch_of_a_named_output_passes():
    check_layer_plugin(NamedPlugin(), Named, lambda layer: torch.randn(3, 5))


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (GivesATuple(), "has a tuple instead of a dict"),
        (GivesAnotherName(), r"has the keys \['z', 'rows'\] instead of \['y', 'rows'\]"),
        (GivesAnotherNumber(), "has 4 instead of 3"),
        (GivesMore(), r"has the keys \['y', 'rows', 'scaling'\] instead"),
    ],
    ids=["a tuple", "another name", "another number", "more"],
)
def test_the_form_of_an_output_is_compared(plugin, said):
    with pytest.raises(CheckError, match=said):
        check_layer_plugin(plugin, Named, lambda layer: torch.randn(3, 5), only=["law"])


class Noisy(Odd):
    """Drops some of its outputs in training."""

    def forward(self, x):
        return F.dropout(F.linear(x, self.weight), 0.25, self.training)


class NoisyPlugin(RowMajorPlugin):
    name = "noisy"
    module_type = Noisy
    branch_types = (Noisy,)
    branch_use = "always"

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"])
        for term in terms:
            dropped = self.dropped(term, x).to(term.A.dtype)
            y = y + (term.scaling * F.linear(F.linear(dropped, term.A), term.B)).to(y.dtype)
        return F.dropout(y, 0.25, layer.training)

    def dropped(self, term, x):
        return term.drop(x)


class NoisyDropsNothing(NoisyPlugin):
    def dropped(self, term, x):
        return x


class NoisyDropsInEvalMode(NoisyPlugin):
    def dropped(self, term, x):
        return F.dropout(x, term.settings.dropout)


def test_a_branch_of_a_layer_that_drops_by_itself_passes():
    check_layer_plugin(NoisyPlugin(), Noisy, lambda layer: torch.randn(3, 5))


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (NoisyDropsNothing(), "with dropout=0.5 every output is that without dropout"),
        (NoisyDropsInEvalMode(), "the output in eval mode differs"),
    ],
    ids=["nothing", "in eval mode"],
)
def test_dropout_beside_that_of_the_layer_is_checked(plugin, said):
    with pytest.raises(CheckError, match=said):
        check_layer_plugin(plugin, Noisy, lambda layer: torch.randn(3, 5), only=["dropout"])


class Gained(nn.Linear):
    def __init__(self):
        super().__init__(5, 4)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return F.linear(x, self.weight * self.gain[:, None], self.bias)


class GainedPlugin(RowMajorPlugin):
    """Right, but for its function: another module that calls it with the weight gets the gain as well."""

    name = "gained"
    module_type = Gained
    branch_types = (Gained,)
    branch_use = "always"
    function = F.linear

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"] * layer.gain[:, None], layer.bias)
        for term in terms:
            low = F.linear(term.drop(x).to(term.A.dtype), term.A)
            y = y + (term.scaling * layer.gain * F.linear(low, term.B)).to(y.dtype)
        return y


def test_a_layer_that_does_more_than_its_function_is_found():
    with pytest.raises(CheckError, match="the output of linear for an untouched layer differs"):
        check_layer_plugin(GainedPlugin(), Gained, lambda layer: torch.randn(3, 5), only=["function"])


class Curved(Odd):
    def forward(self, x):
        return F.linear(F.silu(x), self.weight)


class CurvedPlugin(RowMajorPlugin):
    name = "curved"
    module_type = Curved

    def inputs(self, layer, slot, x):
        return F.silu(x).reshape(-1, x.shape[-1])


class ForgetsTheCurve(CurvedPlugin):
    def inputs(self, layer, slot, x):
        return x.reshape(-1, x.shape[-1])


def test_a_curve_in_front_of_the_weight_is_one_of_its_inputs():
    check_layer_plugin(CurvedPlugin(), Curved, lambda layer: torch.randn(7, 5))
    with pytest.raises(CheckError, match=r"no combination of the vectors that inputs\(\) gave"):
        check_layer_plugin(ForgetsTheCurve(), Curved, lambda layer: torch.randn(7, 5), only=["inputs"])


class InPairs(RowMajorPlugin):
    """Views pairs of numbers as complex ones."""

    name = "in_pairs"
    module_type = nn.Linear

    def to_matrix(self, weight):
        return torch.view_as_complex(weight.unflatten(1, (-1, 2)))

    def from_matrix(self, matrix, shape):
        return torch.view_as_real(matrix).reshape(shape)


def test_a_matrix_of_another_type_than_its_weight_is_found():
    with pytest.raises(CheckError, match=r"to_matrix makes torch\.complex128 of 'weight', torch\.float64"):
        check_layer_plugin(InPairs(), lambda: nn.Linear(6, 4), lambda layer: torch.randn(3, 6), only=["layout"])


class Broken(Odd):
    """Writes to what its own backward needs."""

    def forward(self, x):
        return F.linear(x, self.weight).relu_().add_(1)


class BrokenPlugin(RowMajorPlugin):
    name = "broken"
    module_type = Broken


@pytest.mark.parametrize(("width", "step"), [(5, "backward"), (4, "forward")], ids=["backward", "forward"])
def test_what_fails_without_a_plugin_is_not_blamed_on_one(width, step):
    with pytest.raises(CheckError, match=rf"the {step} of the untouched layer fails .*: RuntimeError: ") as caught:
        check_layer_plugin(BrokenPlugin(), Broken, lambda layer: torch.randn(3, width))
    assert "usual cause" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)  # with the place in the layer


def test_a_gradient_that_is_zero_for_want_of_inputs_is_told_so():
    with pytest.raises(
        CheckError, match=r"the gradient of lora_A_h\.default is zero everywhere .* by the law"
    ) as caught:
        check_layer_plugin(CellPlugin(), Cell, lambda layer: (torch.randn(3, 4), {"h": torch.zeros(3, 4)}))
    assert "usual cause" not in str(caught.value)


class NoWeight(OddPlugin):
    def slots(self, layer):
        raise PluginError("has several paths")


def test_an_error_that_names_the_cause_has_no_usual_one_beside_it():
    with pytest.raises(CheckError, match=r"PluginError: .* has several paths") as caught:
        check(NoWeight())
    assert (caught.value.usual_cause, "usual cause" in str(caught.value)) == ("", False)


class Numbered(nn.Module):
    """Gives beside y = x Wᵀ what is another thing in each call, or of each layer."""

    def __init__(self, beside):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.beside = beside
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.weight), self.beside(self)


class NumberedPlugin(OddPlugin):
    name = "numbered"
    module_type = Numbered


class NumberedBranchPlugin(NumberedPlugin):
    branch_types = (Numbered,)
    branch_use = "always"

    def branch(self, layer, base, terms, x):
        layer.calls += 1
        y = F.linear(x, base["weight"])
        for term in terms:
            y = y + term.scaling * F.linear(F.linear(term.drop(x), term.A), term.B)
        return y, layer.beside(layer)


class MiscountsPlugin(NumberedBranchPlugin):
    """Gives a text where the layer gives a whole number."""

    def branch(self, layer, base, terms, x):
        y, beside = super().branch(layer, base, terms, x)
        return y, str(beside)


BESIDE = {
    "a count of calls": lambda layer: layer.calls,
    "a text about the call": lambda layer: f"call {layer.calls}",
    "nothing in the first call": lambda layer: None if layer.calls == 1 else "warm",
    "a list that grows": lambda layer: [0] * layer.calls,
    "its address": id,
}

OF_THE_MODULE = {
    "the name of its class": lambda layer: type(layer).__name__,
    "whether its weight is trained": lambda layer: layer.weight.requires_grad,
    "how many parameters it has": lambda layer: sum(each.numel() for each in layer.parameters()),
}


@pytest.mark.parametrize("beside", [*BESIDE.values(), *OF_THE_MODULE.values()], ids=[*BESIDE, *OF_THE_MODULE])
def test_a_layer_without_a_branch_may_give_what_is_its_own(beside):
    check_layer_plugin(NumberedPlugin(), lambda: Numbered(beside), lambda layer: torch.randn(3, 5), only=["law"])


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_a_branch_may_give_what_differs_from_call_to_call(beside):
    check_layer_plugin(NumberedBranchPlugin(), lambda: Numbered(beside), lambda layer: torch.randn(3, 5), only=["law"])


def test_a_branch_that_gives_another_form_is_found():
    with pytest.raises(CheckError, match="has a str instead of a int"):
        check_layer_plugin(
            MiscountsPlugin(), lambda: Numbered(lambda layer: 3), lambda layer: torch.randn(3, 5), only=["law"]
        )


class Ragged(nn.Module):
    """y = x Wᵀ, beside rows of several lengths."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x, rows):
        rows = rows[0] if isinstance(rows, list) else rows
        return F.linear(x, self.weight) + rows.size(0)


class RaggedPlugin(OddPlugin):
    name = "ragged"
    module_type = Ragged


def rows():
    return torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own, of each of them
@pytest.mark.parametrize(
    "inputs", [lambda: (torch.randn(3, 5), rows()), lambda: (torch.randn(3, 5), [rows()])], ids=["alone", "in a list"]
)
def test_a_layer_of_rows_of_several_lengths_passes(inputs):
    check_layer_plugin(RaggedPlugin(), Ragged, lambda layer: inputs())
