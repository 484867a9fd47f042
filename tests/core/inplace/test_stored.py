"""Weights that are stored in fewer bytes: the law holds for their dense values, and nothing dense is kept."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lora_plugins import (
    ConfigError,
    LoraConfig,
    LoraModel,
    MergeError,
    PluginError,
    RowMajorPlugin,
    Slot,
    StateError,
    TargetError,
)
from lora_plugins.adapter import transitions
from lora_plugins.inplace import StoredWeight, all_stored, make_dense
from tests.core.layer_cases import LAYER_CASES, LayerCase
from tests.core.libraries import Conv1D
from tests.core.registries import registry_of
from tests.slow import thinned

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""What the law may be off by, as a share of the largest value."""


def config(**fields):
    return LoraConfig(**{"r": 2, "alpha": 3.0, "quantize": "nf4", "quantize_options": {"min_size": 0}, **fields})


def stored_names(model):
    return {name.removesuffix("_stored") for name, module in model.named_modules() if isinstance(module, StoredWeight)}


def randomized(model):
    """Gives everything that is trained values of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def made_dense(model):
    """A copy of a model with the dense values in the place of the stored ones, as float LoRA has them."""
    other = copy.deepcopy(model)
    layers = [(layer, name) for layer, name, _ in all_stored(other)]
    make_dense(other)
    for layer, name in layers:
        layer._parameters[name].requires_grad_(False)
    return other


def results(model, *inputs):
    output = model(*inputs)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": output.detach(), **gradients}


def assert_the_law_holds(model, *inputs):
    dense = made_dense(model)
    assert not stored_names(dense)
    expected = results(dense, *inputs)
    got = results(model, *inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        limit = TOLERANCE[value.dtype] * max(float(value.abs().max()), 1.0)
        assert float((got[name] - value).abs().max()) <= limit, name


class Alone(nn.Sequential):
    """One layer, with as many inputs as it takes."""

    def forward(self, *inputs):
        return self[0](*inputs)


@thinned(2, case={case.id: case for case in LAYER_CASES}, storage=["nf4", "int8"], dtype=[*TOLERANCE])
def test_every_layer_type_computes_the_law(case: LayerCase, storage, dtype):
    torch.manual_seed(0)
    model = Alone(case.make().to(dtype))
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    LoraModel(model, config(quantize=storage))
    assert stored_names(model) == {f"0.{case.weight}"}
    assert_the_law_holds(randomized(model), *inputs)


class Attention(nn.Module):
    """An attention of a sequence on the first features of itself."""

    def __init__(self, features):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, kdim=features, vdim=features, batch_first=True)

    def forward(self, x):
        keys = x[..., : self.mha.kdim]
        return self.mha(x, keys, keys)[0]


@pytest.mark.parametrize(("features", "weights"), [(8, 2), (6, 4)], ids=["fused", "separate"])
def test_attention(features, weights):
    torch.manual_seed(0)
    model = Attention(features).double()
    LoraModel(model, config())
    assert len(stored_names(model)) == weights
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    randomized(model)
    torch.testing.assert_close(model(x), made_dense(model)(x), rtol=0, atol=1e-12)


class Outer(nn.Module):
    """A layer type of a third party: its weight is scaled by a buffer."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 6))
        self.register_buffer("gain", torch.rand(5, 1))

    def forward(self, x):
        return x @ (self.kernel * self.gain).T


class OuterPlugin(RowMajorPlugin[Outer]):
    name = "outer"
    module_type = Outer

    def slots(self, layer):
        return (Slot("kernel"),)

    def biases(self, layer):
        return ()


def test_a_layer_type_of_a_third_party_needs_no_code():
    torch.manual_seed(0)
    model = nn.Sequential(Outer()).double()
    LoraModel(model, config(), registry=registry_of(OuterPlugin()))
    assert_the_law_holds(randomized(model), torch.randn(4, 6, dtype=torch.float64))


class Product(nn.Module):
    """Two weights, of which an adapter may have one part each."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(5, 6)) for _ in range(2))

    def forward(self, x):
        return nn.functional.linear(x, self.left) * nn.functional.linear(x, self.right)


class ProductPlugin(RowMajorPlugin[Product]):
    """Asks which weights an update is added to."""

    name = "product"
    module_type = Product
    branch_types = (Product,)
    branch_use = "always"

    def slots(self, layer):
        return [*self.parts(layer).values()]

    def parts(self, layer):
        return {"q": Slot("left", "q"), "k": Slot("right", "k")}

    def branch(self, layer, base, terms, x):
        weights = {name: base[name] if name in base else getattr(layer, name) for name in ("left", "right")}
        assert {name for name in weights if name in base} == {term.slot.tensor for term in terms}
        for term in terms:
            weights[term.slot.tensor] = weights[term.slot.tensor] + term.delta_weight()
        return nn.functional.linear(x, weights["left"]) * nn.functional.linear(x, weights["right"])


@pytest.mark.parametrize("parts", [["q"], ["q", "k"]], ids="-".join)
def test_a_branch_is_given_the_weights_that_updates_are_added_to(parts):
    torch.manual_seed(0)
    model = nn.Sequential(Product()).double()
    LoraModel(model, config(fused_parts={"0": parts}), registry=registry_of(ProductPlugin()))
    assert_the_law_holds(randomized(model), torch.randn(4, 6, dtype=torch.float64))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 3))


def adapted(**fields):
    model = build()
    lora = LoraModel(model, config(modules_to_save=["4"], **fields))
    randomized(model)
    return lora


def x():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def kept(model, batch):
    """Bytes that the forward keeps for the backward; parameters and the batch left out."""
    own = [each for each in model.parameters() if not type(each).__module__.startswith("torchao")]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*own, batch)}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch).sum()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


@pytest.mark.parametrize(
    "fields", [{}, {"dropout": 0.5}, {"memory": "low"}, {"variant": "dora"}], ids=["plain", "dropout", "low", "dora"]
)
def test_nothing_dense_is_kept_for_the_backward(fields):
    model = adapted(**fields).model
    assert kept(model, x()) <= 1.02 * kept(made_dense(model), x())


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(8, 8, 3), lambda: nn.ConvTranspose2d(8, 8, 3)], ids=["conv", "up"])
@pytest.mark.parametrize("acts", [True, False], ids=["adapted", "disabled"])
def test_nothing_dense_of_a_convolution_is_kept(make, acts):
    model = nn.Sequential(make())
    lora = LoraModel(model, config())
    dense = made_dense(model)
    batch = torch.randn(1, 8, 4, 4, requires_grad=True)
    if acts:
        assert kept(model, batch) <= kept(dense, batch)
        return
    with lora.disable_adapter():
        assert kept(model, batch) == 0


def test_memory_low_computes_its_input_again():
    plain, low = adapted(), adapted(memory="low")
    assert kept(low.model, x()) <= kept(plain.model, x())
    torch.testing.assert_close(results(low.model, x()), results(plain.model, x()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = adapted().model
    expected = results(made_dense(model), x())

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return checkpoint(self.inner, batch.requires_grad_(), use_reentrant=reentrant)

    got = results(Checkpointed(), x())
    for name, value in expected.items():
        torch.testing.assert_close(got[name if name == "output" else f"inner.{name}"], value)


def test_values_saved_on_the_cpu():
    model = adapted().model
    expected = results(made_dense(model), x())
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(results(model, x()), expected)


class OnGraph(nn.Linear):
    """A linear layer whose output is multiplied by a sparse matrix, which the backward needs as well."""

    def forward(self, x, adjacency):
        return torch.sparse.mm(adjacency, super().forward(x))


def test_a_layer_that_keeps_a_sparse_tensor_for_the_backward():
    torch.manual_seed(0)
    model = Alone(OnGraph(8, 16).double())
    LoraModel(model, config(target_modules=["0"]))
    assert_the_law_holds(randomized(model), torch.randn(5, 8, dtype=torch.float64), torch.eye(5).double().to_sparse())


class PacksByItself(nn.Linear):
    """A linear layer that has hooks of its own for what is kept for the backward."""

    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return nn.functional.linear(x, self.weight, self.bias)


def test_a_layer_with_hooks_of_its_own_for_what_is_kept():
    torch.manual_seed(0)
    model = Alone(PacksByItself(8, 16).double())
    LoraModel(model, config(target_modules=["0"]))
    assert_the_law_holds(randomized(model), torch.randn(5, 8, dtype=torch.float64))


def test_a_second_derivative():
    model, dense = adapted().model.double(), made_dense(adapted().model).double()

    def penalty(net):
        batch = x().double().requires_grad_()
        (gradient,) = torch.autograd.grad(net(batch).square().sum(), batch, create_graph=True)
        gradient.square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    torch.testing.assert_close(penalty(model), penalty(dense))


def test_a_factor_that_changed_before_the_backward_is_an_error():
    model = adapted().model
    loss = model(x()).sum()
    with torch.no_grad():
        model[0].lora_B["default"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stored_values_that_changed_before_the_backward_are_an_error():
    model = adapted().model
    loss = model(x()).sum()
    with torch.no_grad():
        model[2].weight_stored.codes.bitwise_not_()
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        loss.backward()


@pytest.mark.usefixtures("compiler_as_new")
def test_compiled_in_one_graph():
    model = adapted().model
    expected = results(made_dense(model), x())
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(model, x()), expected)


@pytest.mark.parametrize(
    "case", {type(case.make()): case for case in reversed(LAYER_CASES)}.values(), ids=lambda case: case.id
)
def test_layers_without_an_adapter_are_compiled_in_one_graph(case: LayerCase):
    torch.manual_seed(0)
    model, inputs = Alone(case.make().double()), case.inputs()
    LoraModel(model, config()).unload(dequantize=False)
    assert stored_names(model) == {f"0.{case.weight}"}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_transforms_of_functions():
    model = adapted().model
    dense = made_dense(model)
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(net):
        return lambda values: torch.func.functional_call(net, values, (x(),)).square().sum()

    torch.testing.assert_close(torch.func.grad(loss(model))(factors), torch.func.grad(loss(dense))(factors))


OF_TORCH_ITSELF = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
"""Torch scripts its rules for dual numbers when they are first used."""


@OF_TORCH_ITSELF
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_transforms_by_dual_numbers(transform):
    model = adapted().model
    dense = made_dense(model)
    got, wanted = (transform(lambda values, net=net: net(values).sin().sum())(x()) for net in (model, dense))
    torch.testing.assert_close(got, wanted)


@OF_TORCH_ITSELF
def test_dual_numbers():
    model = adapted().model
    derivatives = []
    for net in (model, made_dense(model)):
        with forward_ad.dual_level():
            inputs = forward_ad.make_dual(x().requires_grad_(), x().sin())
            output = net(inputs)
            (gradient,) = torch.autograd.grad(output.sin().sum(), inputs)
            derivatives.append([forward_ad.unpack_dual(each).tangent for each in (output, gradient)])
    torch.testing.assert_close(*derivatives)


def test_copies_pickles_and_state_dicts():
    model = adapted().model
    expected = model(x())
    twin = LoraModel(build(), config(modules_to_save=["4"])).model
    assert "0.weight" not in model.state_dict()
    twin.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        assert torch.equal(other(x()), expected)
        assert other[0].weight_stored.codes is not model[0].weight_stored.codes
    LoraModel(model).unload(dequantize=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x()), model(x()))
        assert repr(other) == repr(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_recurrent_layer_at_rest_is_copied(copied):
    model = nn.Sequential(nn.GRU(8, 8), nn.Identity())
    lora = LoraModel(model, LoraConfig(r=2, quantize="int8", quantize_options={"min_size": 0}))
    inputs = torch.randn(3, 2, 8)
    lora.unload(dequantize=False)
    expected = model(inputs)[0]
    assert torch.equal(copied(model)(inputs)[0], expected)


def test_a_cast_is_one_of_the_dense_value():
    model = adapted().model
    before = {name: value.clone() for name, value in model[0].weight_stored.state_dict().items()}
    weight = model[0].weight
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        after = model[0].weight_stored.state_dict()
        assert after.pop("dense_like").dtype == dtype
        assert {name: value.dtype for name, value in after.items()} == {name: before[name].dtype for name in after}
    model.float()
    assert all(torch.equal(value, before[name]) for name, value in model[0].weight_stored.state_dict().items())
    LoraModel(model).unload(dequantize=False)
    LoraModel(model.half(), LoraConfig(r=2, target_modules=["0"]))
    assert model[0].lora_A["default"].dtype == torch.float32
    assert weight.shape == model[0].weight.shape


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_first_floating_tensor_has_the_dense_type(storage):
    """It is what `model.dtype` of transformers and diffusers is, which models cast their inputs to."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 4, bias=False)).bfloat16()
    lora = LoraModel(model, LoraConfig(r=2, target_modules="all", quantize=storage, quantize_options={"min_size": 0}))
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        assert next(each.dtype for each in model.parameters() if each.is_floating_point()) == dtype
        assert model(torch.ones(2, 64, dtype=dtype)).dtype == dtype
    lora.unload(dequantize=False)
    assert model[0].weight.dtype == torch.float16


def test_no_stored_tensor_is_left_out_of_a_file_as_a_shared_one():
    """accelerate takes tensors without a storage of their own, as all empty ones are, for one that is shared."""
    utils = pytest.importorskip("accelerate.utils")
    state = adapted(quantize_modules="all").model.state_dict()
    assert utils.clean_state_dict_for_safetensors(dict(state)).keys() == state.keys()


def test_without_adapters_it_computes_the_dense_value():
    lora = adapted()
    dense = made_dense(lora.model)
    with lora.disable_adapter(), LoraModel(dense).disable_adapter():
        assert torch.equal(lora.model(x()), dense(x()))
    lora.unload(dequantize=False)
    LoraModel(dense).unload()
    assert torch.equal(lora.model(x()), dense(x()))
    assert stored_names(lora.model) == {"0.weight", "2.weight"}
    assert isinstance(lora.model[0], nn.Linear)


def test_an_embedding_makes_only_the_looked_up_rows_dense(monkeypatch):
    model = nn.Sequential(nn.Embedding(100, 64))
    lora = LoraModel(model, config())
    lora.add_adapter("other", LoraConfig(r=1))
    monkeypatch.setattr(StoredWeight, "dense", lambda self: pytest.fail("all rows were made dense"))
    index = torch.tensor([[3, 99], [0, 3]])
    assert model(index).shape == (2, 2, 64)
    model.eval()
    with lora.mixed_batch(["other", None]):
        model(index)
    with lora.disable_adapter():
        model(index)
    lora.unload(dequantize=False)
    model(index)


def test_rows_of_a_table_with_a_merged_update_have_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 64)).double().eval()
    lora = LoraModel(model, config(quantize="int8"), "a")
    lora.add_adapter("b", LoraConfig(r=2))
    randomized(model)
    lora.set_adapter(["a", "b"])
    index = torch.tensor([[3, 99], [0, 3]])
    expected = model(index).detach()
    lora.merge_adapter("a", max_error=1.0)
    torch.testing.assert_close(model(index).detach(), expected, rtol=0, atol=1e-12)


def test_a_stored_embedding_keeps_its_largest_norm():
    model = nn.Sequential(nn.Embedding(8, 64, max_norm=0.5))
    LoraModel(model, config()).unload(dequantize=False)
    weight, index = model[0].weight, torch.tensor([3, 7])
    assert torch.equal(model(index), nn.functional.embedding(index, weight, max_norm=0.5))
    assert (weight[index].norm(dim=1) - 0.5).abs().max() <= 1e-6  # in place, in what was made dense for the call


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("row", [-1, 100])
def test_a_row_that_is_not_there_is_an_error(storage, row):
    model = nn.Sequential(nn.Embedding(100, 33))
    LoraModel(model, config(quantize=storage)).unload(dequantize=False)
    with pytest.raises(IndexError):
        model(torch.tensor([3, row]))


def test_adapters_on_one_stored_base():
    model = build()
    lora = LoraModel(model, config(modules_to_save=["4"]), "a")
    codes = model[0].weight_stored.codes
    lora.add_adapter("b", config(modules_to_save=["4"]))
    lora.add_adapter("c", LoraConfig(r=3, target_modules=["0"]))
    assert model[0].weight_stored.codes is codes
    for name in ("a", "b", "c"):
        lora.set_adapter(name)
        model(x()).sum().backward()
    with pytest.raises(TargetError, match=r"'0.weight': it is stored as nf4 with .* already"):
        lora.add_adapter("d", config(quantize="int8"))
    lora.delete_adapter("a")
    assert model[0].weight_stored.codes is codes


def test_tied_weights_are_stored_once():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)}).double()
    model["head"].weight = model["embed"].weight
    model.forward = lambda index: model["head"](model["embed"](index))
    LoraModel(model, config())
    assert model["head"].weight_stored is model["embed"].weight_stored
    assert torch.equal(model["head"].weight, model["embed"].weight)
    other = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    other["head"].weight = other["embed"].weight
    for fields in ({"target_modules": ["embed"]}, {"quantize_modules": ["embed"]}):
        with pytest.raises(MergeError, match=r"'head.weight', which the adapter does not store .* in quantize_modules"):
            LoraModel(other, config(**fields))
    assert not stored_names(other)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"0.weight", "2.weight"}),
        ({"target_modules": ["0"]}, {"0.weight"}),
        ({"target_modules": ["0"], "quantize_modules": "all"}, {"0.weight", "2.weight"}),
        ({"quantize_modules": ["2"]}, {"2.weight"}),
        ({"quantize_options": {"min_size": 6144}}, {"0.weight", "2.weight"}),
        ({"quantize_options": {}}, {"0.weight", "2.weight"}),
    ],
    ids=["adapted", "fewer-adapted", "more", "fewer", "size", "default-size"],
)
def test_which_weights_are_stored(fields, expected):
    lora = adapted(**fields)
    assert stored_names(lora.model) == set(lora.plans["default"].stored) == expected
    assert "stored as 'nf4'" in str(lora.plans["default"])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"quantize": "nf5"}, PluginError, r"There is no storage 'nf5'.*nf4"),
        ({"quantize": "4bit"}, PluginError, r"There is no storage '4bit'. 4 bits are 'nf4' here."),
        ({"quantize": "FP8"}, PluginError, r"There is no storage 'FP8'. 8 bits are 'int8' here."),
        ({"quantize": "none"}, PluginError, r"Leave it out, or write None"),
        ({"quantize_options": {"bits": 4}}, ConfigError, r"quantize_options: 'nf4' has no option 'bits'"),
        ({"quantize_modules": ["9"]}, TargetError, "quantize_modules: '9' matches no module"),
        ({"quantize_modules": ["1"]}, TargetError, "quantize_modules: '1' matches '1', which no plugin adapts"),
        ({"quantize_modules": ["0", "4"]}, TargetError, "'4' matches '4', which modules_to_save trains in full"),
        ({"quantize_options": {"block_size": 10**9}}, ConfigError, "is an even count up to 4096, not 1000000000"),
        ({"quantize_options": {"min_size": 10**6}}, TargetError, "stores nothing: all weights of 2 layers have fewer"),
        ({"quantize": None}, ConfigError, "quantize_options says something of stored weights; set quantize too"),
        ({"quantize_modules": []}, ConfigError, "quantize_modules is empty"),
        ({"init": "loftq", "init_options": {"bits": 2}}, ConfigError, "'bits' of 'loftq' are those of quantize='nf4'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(fields, error, message, untouched):
    model = build()
    with untouched(model), pytest.raises(error, match=message):
        LoraModel(model, config(**{"modules_to_save": ["4"], **fields}))


def test_weights_that_cannot_be_stored(untouched):
    model = build()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with untouched(model), pytest.raises(TargetError, match=r"'0.weight': it is a buffer, or computed from other"):
        LoraModel(model, config())
    model = build()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(StateError, match=r"'2.weight' has values that are not finite"):
        LoraModel(model, config())
    assert not stored_names(model)
    model = build()
    lora = LoraModel(model, LoraConfig(r=2), "float")
    with untouched(model), pytest.raises(TargetError, match=r"an adapter was trained on its float value"):
        lora.add_adapter("nf4", config())


def test_a_head_on_stored_weights_is_refused(untouched):
    lora = adapted()
    with untouched(lora.model), pytest.raises(TargetError, match=r"cannot be trained: '2.weight_stored.codes"):
        lora.add_adapter("other", LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))


def test_dense_values_do_not_load_over_stored_ones():
    model = adapted().model
    with pytest.raises(RuntimeError, match=r"'0.weight' is stored as nf4 here and dense in the state dict"):
        model.load_state_dict(build().state_dict())


@pytest.mark.parametrize("adapters", [True, False], ids=["adapted", "unloaded"])
def test_a_stored_weight_is_not_assigned(adapters):
    lora = adapted()
    if not adapters:
        lora.unload(dequantize=False)
    with pytest.raises(StateError, match=r"'weight' of this Linear is stored as nf4 and cannot be assigned"):
        lora.model[0].weight = nn.Parameter(torch.zeros(96, 64))
    lora.model[0].bias = None


def test_what_fails_in_the_middle_leaves_the_float_model(monkeypatch, untouched):
    model = build()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(transitions, "attach", fail)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        LoraModel(model, config())


def test_a_conv1d_of_transformers_is_stored_as_it_lies():
    model = nn.Sequential(Conv1D(5, 64)).double()
    LoraModel(model, config())
    assert model[0].weight_stored.shape == (64, 5)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_rows_looked_up_by_a_transposed_index_are_contiguous(storage):
    model = nn.Sequential(nn.Embedding(64, 64))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none", quantize=storage))
    index = torch.arange(12).view(3, 4)
    torch.testing.assert_close(model(index.T).view(12, 64), model(index.T.contiguous()).view(12, 64), rtol=0, atol=0)
