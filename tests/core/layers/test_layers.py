"""The law: an adapted layer computes what the untouched layer computes with `W + scaling * B @ A`."""

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel, TargetError
from tests.core.layer_cases import LAYER_CASES, LayerCase
from tests.slow import thinned

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

all_layers = pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.id)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)


def make(case: LayerCase) -> Holder:
    return Holder(case.make().double())


def adapt(model: nn.Module, **fields) -> LoraModel:
    return LoraModel(model, LoraConfig(**{"r": 3, "alpha": 5.0, "init": "none", **fields}))


def with_updated_weight(case: LayerCase, base: nn.Module, adapted: nn.Module) -> nn.Module:
    """The untouched layer with the law's weight, written out by hand, and a gradient path to A and B."""
    layer = copy.deepcopy(base).layer
    A, B = adapted.layer.lora_A["default"], adapted.layer.lora_B["default"]
    weight = getattr(layer, case.weight).detach()
    delattr(layer, case.weight)
    setattr(layer, case.weight, weight + case.layout(5.0 / 3 * (B @ A), weight.shape))
    return layer


@all_layers
def test_forward_and_gradients_follow_the_law(case: LayerCase):
    base = make(case)
    model = copy.deepcopy(base)
    adapt(model)
    inputs = case.inputs()
    law = with_updated_weight(case, base, model)
    leaves = [model.layer.lora_A["default"], model.layer.lora_B["default"]]
    expected = law(*inputs)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    output = model(*inputs)
    gradients = torch.autograd.grad((output * weights).sum(), leaves)
    torch.testing.assert_close(output, expected, **TIGHT)
    torch.testing.assert_close(gradients, expected_gradients, **TIGHT)
    assert all(gradient.any() for gradient in gradients)


@all_layers
def test_autocast_leaves_float64_alone(case: LayerCase):
    model, inputs = make(case).eval(), case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        untouched = model(*inputs)
    adapt(model)
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*inputs)
    assert got.dtype == untouched.dtype
    if got.dtype == torch.float64:  # not where the layer itself casts
        torch.testing.assert_close(got, expected, **TIGHT)


@thinned(2, case={case.id: case for case in LAYER_CASES}, variant=["lora", "dora"])
def test_autocast_rounds_no_update_of_a_layer_that_it_leaves_alone(case: LayerCase, variant):
    """As an embedding: what is adapted computes what is merged, with the gradients of a step without autocast."""
    torch.manual_seed(0)
    model, inputs = Holder(case.make()), [x.float() if x.is_floating_point() else x for x in case.inputs()]
    try:
        lora = adapt(model, variant=variant)
    except TargetError:
        pytest.skip("the layer has no such variant")

    def results(*, enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(*inputs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [output, *torch.autograd.grad(output.float().square().sum(), trained)]

    with lora.disable_adapter(), torch.no_grad():
        expected = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            is_left_alone = torch.equal(model(*inputs), expected)
    if is_left_alone:
        torch.testing.assert_close(results(enabled=True), results(enabled=False), rtol=1e-6, atol=1e-6)


@all_layers
def test_the_meta_device_computes_shapes(case: LayerCase):
    model = make(case)
    adapt(model)
    inputs = case.inputs()
    expected = model(*inputs).shape
    assert model.to("meta")(*(x.to("meta") for x in inputs)).shape == expected


@all_layers
def test_merge_unmerge_and_unload(case: LayerCase):
    model = make(case)
    original = copy.deepcopy(model.state_dict())
    base_class = type(model.layer)
    lora = adapt(model)
    inputs = case.inputs()
    with torch.no_grad():
        adapted = model(*inputs)
        report = lora.merge_adapter()
        assert report.worst < 1e-12
        assert type(model.layer) is base_class
        torch.testing.assert_close(model(*inputs), adapted, **TIGHT)
        lora.unmerge_adapter()
        torch.testing.assert_close(model(*inputs), adapted, rtol=0, atol=0)
    assert lora.unload() is model
    assert type(model.layer) is base_class
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


@all_layers
def test_merge_and_unload_is_the_plain_layer(case: LayerCase):
    model = make(case)
    keys, base_class = model.state_dict().keys(), type(model.layer)
    lora = adapt(model)
    inputs = case.inputs()
    with torch.no_grad():
        adapted = model(*inputs)
        merged = lora.merge_and_unload()
        assert type(merged.layer) is base_class
        assert merged.state_dict().keys() == keys
        torch.testing.assert_close(merged(*inputs), adapted, **TIGHT)


@thinned(2, case={case.id: case for case in LAYER_CASES if case.dropout})
def test_dropout_acts_on_the_branch_in_training_only(case: LayerCase):
    model = make(case)
    adapt(model, dropout=0.5)
    inputs = case.inputs()
    model.eval()
    expected = model(*inputs)
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
    model.train()
    with LoraModel(model).disable_adapter():
        base = model(*inputs)
    # Dropping is a linear operation on the branch: its mean over many draws is the branch itself.
    torch.manual_seed(0)
    mean = torch.stack([model(*inputs) - base for _ in range(100)]).mean(0)
    branch = expected - base
    assert (mean - branch).abs().mean() < 0.25 * branch.abs().mean()
    assert not torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize("case", [case for case in LAYER_CASES if not case.dropout], ids=lambda case: case.id)
def test_a_layer_that_cannot_drop_refuses(case: LayerCase):
    model = make(case)
    with pytest.raises(TargetError, match=r"'layer'.*cannot honor dropout=0\.5"):
        adapt(model, dropout=0.5)
    assert "_lora_model" not in model.__dict__


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["free", "max_norm"])
@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scale_grad"])
def test_embedding_options_together(sparse: bool, max_norm: float | None, scale: bool):
    options = {"padding_idx": 3, "max_norm": max_norm, "scale_grad_by_freq": scale}
    dense, chosen = nn.Embedding(7, 5, **options).double(), nn.Embedding(7, 5, sparse=sparse, **options).double()
    chosen.load_state_dict(dense.state_dict())
    input = torch.tensor([[0, 3, 3, 1], [6, 0, 2, 3]])
    results = []
    for layer in (dense, chosen):
        model = Holder(layer)
        adapt(model)
        output = model(input)
        output.square().sum().backward()
        results.append((output, model.layer.lora_A["default"].grad, model.layer.lora_B["default"].grad))
    torch.testing.assert_close(*results, **TIGHT)


# Scaling by frequency, the frozen padding row and the renormalization are, by design, not derivatives of the output.
NOT_A_DERIVATIVE = {"embedding-scale_grad", "embedding-padding", "embedding-max_norm"}


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in LAYER_CASES
        if case.id not in NOT_A_DERIVATIVE and ("groups" not in case.id or "groups2-stride2-dilation2" in case.id)
    ],
    ids=lambda case: case.id,
)
def test_gradients_against_finite_differences(case: LayerCase):
    model = make(case)
    adapt(model, r=2)
    A, B = model.layer.lora_A["default"], model.layer.lora_B["default"]
    inputs = case.inputs()

    def run(a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"layer.lora_A.default": a, "layer.lora_B.default": b}, inputs)

    assert torch.autograd.gradcheck(run, (A.detach().requires_grad_(), B.detach().requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=["rows", "tokens"])
def test_what_follows_may_write_into_the_output(shape):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(shape)).sum().backward()
    assert model[0].lora_B["default"].grad.norm() > 0


class TestFusedParts:
    def test_only_the_named_rows_change(self):
        model = Holder(nn.Linear(4, 12)).double()
        base = model.layer.weight.detach().clone()
        adapt(model, fused_parts={"layer": ["q", "v"]})
        change = (model.layer.weight - base).detach()
        A, B = model.layer.lora_A_v["default"], model.layer.lora_B_v["default"]
        torch.testing.assert_close(change[8:], (5 / 3 * B @ A).detach(), **TIGHT)
        assert (change[4:8] == 0).all()
        assert (change[:4] != 0).any()
        x = torch.randn(3, 4, dtype=torch.float64)
        torch.testing.assert_close(model(x), nn.functional.linear(x, model.layer.weight, model.layer.bias), **TIGHT)

    def test_a_layer_that_does_not_split_refuses(self):
        with pytest.raises(TargetError, match="'layer' has no part 'q'"):
            adapt(Holder(nn.Linear(4, 11)), fused_parts={"layer": ["q"]})


class TestSharing:
    def test_one_module_under_two_names(self):
        layer = nn.Linear(4, 4).double()
        model = nn.ModuleDict({"first": layer, "second": layer})
        adapt(model, target_modules=["second"])
        assert model["first"] is model["second"]
        assert len([p for p in model.parameters() if p.requires_grad]) == 2

    @pytest.mark.parametrize("order", [("embed", "head"), ("head", "embed")], ids=str)
    def test_one_adapter_serves_a_tied_weight(self, order):
        parts = {"embed": nn.Embedding(7, 4).double(), "head": nn.Linear(4, 7, bias=False).double()}
        parts["head"].weight = parts["embed"].weight
        model = nn.ModuleDict({name: parts[name] for name in order})
        original = copy.deepcopy(model.state_dict())
        lora = adapt(model)
        assert len([p for p in model.parameters() if p.requires_grad]) == 2
        torch.testing.assert_close(model["embed"].weight, model["head"].weight, rtol=0, atol=0)
        x, index = torch.randn(2, 4, dtype=torch.float64), torch.tensor([1, 5])
        with torch.no_grad():
            outputs = model["head"](x), model["embed"](index)
            torch.testing.assert_close(outputs[0], x @ model["embed"].weight.T, **TIGHT)
            torch.testing.assert_close(outputs[1], model["head"].weight[index], **TIGHT)
            lora.merge_adapter()
            torch.testing.assert_close(model["head"](x), outputs[0], **TIGHT)
            torch.testing.assert_close(model["embed"](index), outputs[1], **TIGHT)
        lora.unload()
        assert model["head"].weight is model["embed"].weight
        assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("variant", ["lora", "dora"])
    @pytest.mark.parametrize(
        ("kind", "other", "shape"),
        [
            pytest.param(lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 4, bias=False), (6, 4), id="linear"),
            pytest.param(
                lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Conv2d(4, 4, 3, stride=2), (2, 4, 5, 5), id="conv2d"
            ),
        ],
    )
    def test_dropout_acts_on_the_input_of_each_layer_of_a_type(self, kind, other, shape, variant):
        torch.manual_seed(0)
        model = nn.Sequential(kind(), nn.Tanh(), other()).double()
        model[2].weight = model[0].weight
        lora = adapt(model, dropout=0.5, variant=variant)
        merged = LoraModel(copy.deepcopy(model)).merge_and_unload()
        with torch.no_grad():
            x, small = torch.randn(shape, dtype=torch.float64), 1e-4
            model[0].lora_B["default"].mul_(small)
            assert model[2].lora_B["default"] is model[0].lora_B["default"]
            with lora.disable_adapter():
                base = [model[0](x), model[2](x)]
            for layer, plain in zip((model[0], model[2]), base, strict=True):
                full = layer.eval()(x) - plain
                layer.train()
                mean = torch.stack([layer(x) - plain for _ in range(200)]).mean(0)
                assert (mean - full).abs().mean() < 0.25 * full.abs().mean()
                assert not torch.equal(layer(x), layer(x))
            model[0].lora_B["default"].div_(small)
            torch.testing.assert_close(model.eval()(x), merged(x), **TIGHT)

    @pytest.mark.parametrize("named", ["embed", "head"])
    def test_patterns_may_name_any_layer_of_a_tie(self, named):
        model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        plan = LoraModel.plan(model, LoraConfig(rank_pattern={named: 2}, alpha_pattern={named: 6}))
        assert [(layer.name, layer.r, layer.scaling) for layer in plan.layers] == [("embed", 2, 3.0)]


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "pruned": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5),
    "old_spectral_norm": nn.utils.spectral_norm,
}


class TestComputedWeights:
    @pytest.mark.parametrize("kind", COMPUTED)
    def test_the_law_holds_for_what_is_computed(self, kind):
        model = Holder(COMPUTED[kind](nn.Linear(5, 4).double())).eval()
        x = torch.randn(3, 5, dtype=torch.float64)
        model(x)
        original, base_class = copy.deepcopy(model.state_dict()), type(model.layer)
        weight = model.layer.weight.detach().clone()
        lora = adapt(model)
        A, B = model.layer.lora_A["default"], model.layer.lora_B["default"]
        expected = x @ (weight + 5 / 3 * B @ A).T + model.layer.bias
        output = model(x)
        torch.testing.assert_close(output, expected, **TIGHT)
        output.sum().backward()
        assert A.grad.abs().max() > 0
        assert B.grad.abs().max() > 0
        with torch.no_grad():
            lora.merge_adapter()
            torch.testing.assert_close(model(x), expected, **TIGHT)
            lora.unmerge_adapter()
            torch.testing.assert_close(model(x), output, rtol=0, atol=0)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            LoraModel(copied).merge_and_unload()
            torch.testing.assert_close(copied(x), expected, **TIGHT)
            assert isinstance(copied.layer.weight, nn.Parameter)
        lora.unload()
        assert type(model.layer) is base_class
        assert model.state_dict().keys() == original.keys()
        assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


class TestThePythonObject:
    def make(self) -> tuple[nn.Module, LoraModel, Tensor]:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)).double()
        return model, adapt(model), torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def test_stays_the_same_object_of_its_class(self):
        model, _, _ = self.make()
        assert isinstance(model[0], nn.Conv2d)
        assert model[0].in_channels == 3
        assert "lora[default: r=3, alpha=5]" in repr(model)

    def test_hooks_keep_working(self):
        model = nn.Sequential(nn.Linear(4, 4))
        calls = []
        model[0].register_forward_hook(lambda *_: calls.append(1))
        adapt(model)
        model(torch.randn(2, 4))
        assert calls == [1]

    @pytest.mark.parametrize(
        "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies_are_adapted_too(self, copier):
        model, _, x = self.make()
        copied = copier(model)
        torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
        assert copied[0].lora_A["default"] is not model[0].lora_A["default"]
        assert type(copied[0]) is type(model[0])
        LoraModel(copied).unload()
        assert type(copied[0]) is nn.Conv2d
        assert LoraModel(model).active_adapters == ("default",)

    def test_a_plain_list_of_layers_sees_the_adapters(self):
        class Listed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
                self.order = [self.second, self.first]

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.order:
                    x = layer(x)
                return x

        model, x = Listed().double(), torch.randn(2, 4, dtype=torch.float64)
        lora = adapt(model)
        output = model(x)
        torch.testing.assert_close(output, model.first(model.second(x)), rtol=0, atol=0)
        output.sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        lora.merge_and_unload()
        torch.testing.assert_close(model(x), output, **TIGHT)

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        model, _, x = self.make()
        model.eval()
        gradients = []
        for run in (model, lambda x: torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)):
            model.zero_grad()
            run(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        for first, second in zip(*gradients, strict=True):
            assert torch.equal(first, second)

    @pytest.mark.usefixtures("compiler_as_new")
    def test_compile_without_graph_breaks(self):
        model, _, x = self.make()
        model.train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), **TIGHT)

    def test_export(self):
        model, _, x = self.make()
        model.eval()
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), **TIGHT)

    def test_fx(self):
        model, _, x = self.make()
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), model(x), **TIGHT)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_jit(self):
        model, lora, x = self.make()
        model.eval()
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x), **TIGHT)
        lora.unload()
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), **TIGHT)

    def test_functional_call_and_vmap(self):
        model = nn.Sequential(nn.Linear(4, 3)).double()
        adapt(model)
        parameters = dict(model.named_parameters())
        x = torch.randn(5, 4, dtype=torch.float64)
        per_sample = torch.func.vmap(lambda row: torch.func.functional_call(model, parameters, row))(x)
        torch.testing.assert_close(per_sample, model(x), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 2), (1, 5), (3, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_kernel_with_channels_last(make, kernel, groups, dtype):
    torch.manual_seed(0)
    layer = make(4, 4, kernel, groups=groups).to(dtype)
    model = nn.Sequential(layer).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6, dtype=dtype).to(memory_format=torch.channels_last)
    LoraModel(model, LoraConfig(r=2, init="none", target_modules=["0"]))
    plain = make(4, 4, kernel, groups=groups).to(dtype)
    plain.load_state_dict({"weight": layer.weight.detach().contiguous(), "bias": layer.bias.detach()})
    found, expected = model(x), plain(x.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, None)
    assert layer.lora_A.default.grad.abs().sum() > 0
