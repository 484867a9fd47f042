"""What inits and variants of others return is checked before anything is touched, and kept as a copy."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_plugins import (
    InitData,
    InitPlugin,
    LoraConfig,
    LoraModel,
    PluginError,
    StateError,
    TargetError,
    VariantPlugin,
)
from lora_plugins.variants.dora import DoraVariant
from tests.core.registries import registry_of


class Start(InitPlugin):
    name = "start"

    def fill(self, context):
        nn.init.normal_(context.A, generator=context.generator)
        nn.init.zeros_(context.B)
        return {}


class Forgets(Start):
    def fill(self, context):
        super().fill(context)


class RecipeForNothing(Start):
    def fill(self, context):
        return {**super().fill(context), "u": torch.ones(2)}


class LeavesB(Start):
    def fill(self, context):
        nn.init.normal_(context.A, generator=context.generator)
        return {}


class DividesByZero(Start):
    def fill(self, context):
        nn.init.zeros_(context.B)
        context.A.copy_(torch.ones_like(context.A) / context.B.sum())
        return {}


class OtherShape(Start):
    def fill(self, context):
        context.A.data = torch.ones(5, 4)
        return super().fill(context)


class WritesWeight(Start):
    def fill(self, context):
        context.weight.mul_(2)
        return super().fill(context)


class Changes(Start):
    changes_base = True

    def changed_base(self, weight, recipe, scaling, options):
        return weight * 0.5


class ListInRecipe(Changes):
    def fill(self, context):
        return {**super().fill(context), "u": [1, 2]}


class TensorAndNumber(Changes):
    def fill(self, context):
        return {**super().fill(context), "u": torch.ones(40, 40), "gain": 2.0}


class Recipe(Changes):
    def __init__(self, name, value):
        self.recipe = {name: value}

    def fill(self, context):
        return {**super().fill(context), **self.recipe}


class OneRow(Changes):
    def changed_base(self, weight, recipe, scaling, options):
        return weight[:1]


class NoNumbers(Changes):
    def changed_base(self, weight, recipe, scaling, options):
        return weight * math.nan


class ChangesInPlace(Changes):
    """Writes into what it is handed, and forgets to return it."""

    def changed_base(self, weight, recipe, scaling, options):
        weight.mul_(0.5)


class ReturnsInPlace(Changes):
    def changed_base(self, weight, recipe, scaling, options):
        return weight.mul_(0.5)


class NoRanks(Start):
    needs = "inputs"

    def allocate(self, requests, options):
        return None


class Ranks(Start):
    needs = "inputs"

    def __init__(self, r):
        self.r = r

    def allocate(self, requests, options):
        return {request.layer: self.r for request in requests}


class Gate(VariantPlugin):
    name = "gate"
    first = {"g": torch.ones(1)}  # noqa: RUF012

    def shapes(self, rows, columns, r):
        return {"g": (1,)}

    def first_values(self, weight, A, B, scaling):
        return self.first

    def delta_weight(self, weight, A, B, scaling, own):
        return scaling * (B @ A)


class OneRowOfUpdate(Gate):
    def delta_weight(self, weight, A, B, scaling, own):
        return (own["g"] * scaling * (B @ A))[:1]


class NoUpdate(Gate):
    def delta_weight(self, weight, A, B, scaling, own):
        return None


class WritesFirst(Gate):
    def first_values(self, weight, A, B, scaling):
        weight.add_(1)
        return super().first_values(weight, A, B, scaling)


class Number(Gate):
    def shapes(self, rows, columns, r):
        return {"g": 1}


class NamedAsFactor(Gate):
    first = {"A": torch.ones(1)}  # noqa: RUF012

    def shapes(self, rows, columns, r):
        return {"A": (1,)}


class NamedByNumber(Gate):
    first = {0: torch.ones(1)}  # noqa: RUF012

    def shapes(self, rows, columns, r):
        return {0: (1,)}


class NoMapping(Gate):
    def first_values(self, weight, A, B, scaling):
        return torch.ones(1)


class Views(Gate):
    """Starts its tensors with what it is handed."""

    def shapes(self, rows, columns, r):
        return {"left": (r, columns), "row": (columns,)}

    def first_values(self, weight, A, B, scaling):
        return {"left": A, "row": weight[0]}

    def delta_weight(self, weight, A, B, scaling, own):
        return scaling * (B @ (A + own["left"])) + B @ A * own["row"]


class NamedBackwards(Views):
    """Names its tensors in another order than its shapes."""

    def first_values(self, weight, A, B, scaling):
        return dict(reversed(super().first_values(weight, A, B, scaling).items()))


def first(**values):
    return type("Gate", (Gate,), {"first": values or None})()


def adapted(plugin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    field = {"init": plugin.name} if isinstance(plugin, InitPlugin) else {"variant": plugin.name}
    try:
        lora = LoraModel(
            model, LoraConfig(r=2, **field), registry=registry_of(plugin), init_data=InitData([torch.randn(5, 4)])
        )
    except (PluginError, ValueError):
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        raise
    return lora, before


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Forgets(), r"fill\(\) of the init 'start' returned None for '0', not {}"),
        (LeavesB(), r"fill\(\) of the init 'start' left values of A or B of '0' unset, or not finite"),
        (DividesByZero(), r"left values of A or B of '0' unset, or not finite"),
        (OtherShape(), r"A and B of '0' other shapes, {'A': \(5, 4\), .*: they are {'A': \(2, 4\), .* in place"),
        (TensorAndNumber(), r"fill\(\) of the init 'start' returned {'gain': 2.0} for '0', not a mapping of tensors"),
        (Ranks(2**17), r"gave ranks that are not whole numbers up to 65536"),
        (Ranks(1.5), r"gave ranks that are not whole numbers"),
        (first(g=torch.ones(1, dtype=torch.cfloat)), r"gives \['g'\] of '0' types that cannot be trained"),
        (first(g=torch.ones(1).long()), r"gives \['g'\] of '0' types that cannot be trained"),
        (RecipeForNothing(), r"returned \['u'\] for '0'.*says changes_base=False. Return {}"),
        (ListInRecipe(), r"returned {'u': \[1, 2\]} for '0', not a mapping of tensors"),
        (Recipe("u/v", torch.ones(2)), r"returned \['u/v'\] for '0', which no file can hold"),
        (Recipe(0, torch.ones(2)), r"returned \[0\] for '0', which no file can hold"),
        (Recipe("u", torch.ones(2).to_sparse()), r"returned \['u'\] for '0', which no file can hold"),
        (OneRow(), r"computed \(1, 4\) as the base of '0', where the weight is \(3, 4\)"),
        (NoNumbers(), r"computed a base of '0' with values that are not dense and finite"),
        (ChangesInPlace(), r"computed None as the base of '0'"),
        (NoRanks(), r"allocate\(\) of the init 'start' returned None"),
        (first(g=torch.ones(2)), r"variant 'gate' cannot serve '0'.*{'g': \(1,\)}.*{'g': \(2,\)}"),
        (first(), r"shapes\(\) gives {'g': \(1,\)}, and first_values\(\) tensors of {}"),
        (first(g=torch.ones(1), h=torch.ones(1)), r"tensors of {'g': \(1,\), 'h': \(1,\)}"),
        (first(g=1.0), r"tensors of {'g': None}"),
        (first(g=torch.full((1,), math.nan)), r"gives \['g'\] of '0' no values that are dense and finite"),
        (first(g=torch.ones(1).to_sparse()), r"gives \['g'\] of '0' no values that are dense and finite"),
        (first(g=torch.ones(1, device="meta")), r"gives \['g'\] of '0' no values that are dense and finite"),
        (Number(), r"shapes\(\) gives {'g': 1}"),
        (NamedAsFactor(), r"tensors that cannot be called so: \['A'\]"),
        (NamedByNumber(), r"tensors that cannot be called so: \[0\]"),
        (NoMapping(), r"shapes\(\) gives {'g': \(1,\)}, and first_values\(\) tensors of {}"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, InitPlugin | VariantPlugin) else "",
)
def test_wrong_answers_are_refused_by_name_and_nothing_is_touched(plugin, message):
    with pytest.raises(PluginError, match=message):
        adapted(plugin)


@pytest.mark.parametrize("plugin", [WritesWeight(), WritesFirst()], ids=["init", "variant"])
def test_a_weight_that_was_written_to_is_told(plugin):
    """It is the model's own: copies of all weights would take several times as long as to start A and B."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    field = {"init": plugin.name} if isinstance(plugin, InitPlugin) else {"variant": plugin.name}
    with pytest.raises(PluginError, match=r"for '0', wrote into the weight .* Build the model again.*weight.clone\(\)"):
        LoraModel(model, LoraConfig(r=2, **field), registry=registry_of(plugin))
    assert type(model[0]) is nn.Linear


def test_ranks_of_numpy_are_ranks(tmp_path):
    r = np.int64(3)
    lora, base = adapted(Ranks(r))
    lora.save_adapter(tmp_path)
    model = nn.Sequential(nn.Linear(4, 3))
    model.load_state_dict(base)
    loaded = LoraModel.load_adapter(model, tmp_path, registry=registry_of(Ranks(r)))
    assert [layer.r for layer in loaded.plans["default"].layers] == [3]


def failing(base, method):
    def fail(self, *arguments):
        raise ValueError("no license server")

    return type("Failing", (base,), {method: fail})()


@pytest.mark.parametrize(
    ("plugin", "place"),
    [
        (failing(Start, "fill"), "fill() of the init 'start', for '0'"),
        (failing(Changes, "changed_base"), "the init 'start', computing the base of '0'"),
        (failing(NoRanks, "allocate"), "allocate() of the init 'start'"),
        (failing(Start, "check_options"), "check_options() of the init 'start'"),
        (failing(Gate, "refusal"), "refusal() of the variant 'gate', for '0'"),
        (failing(Gate, "shapes"), "shapes() of the variant 'gate', for '0'"),
        (failing(Gate, "first_values"), "first_values() of the variant 'gate', for '0'"),
    ],
    ids=["fill", "changed_base", "allocate", "check_options", "refusal", "shapes", "first_values"],
)
def test_an_error_of_a_plugin_is_told_with_its_place_and_nothing_is_touched(plugin, place):
    with pytest.raises(ValueError, match="no license server") as caught:
        adapted(plugin)
    assert caught.value.__notes__ == [f"It was raised in {place}."]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_variant_that_does_not_first_add_what_an_init_took_out_is_refused(init):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = LoraConfig(r=2, init=init, variant="gate")
    with pytest.raises(TargetError, match=r"The init '\w+' takes .* first update of the variant 'gate' .* at '0'"):
        LoraModel(model, config, registry=registry_of(Views()))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    x = torch.randn(2, 4)
    untouched = model(x)
    LoraModel(model, config, registry=registry_of(Gate()))
    torch.testing.assert_close(model(x), untouched, rtol=1e-5, atol=1e-6)


def test_own_tensors_have_the_order_of_shapes_as_loaded_ones_have(tmp_path):
    """The state of an optimizer, which knows parameters by their order, then belongs to the loaded adapter too."""
    lora, base = adapted(NamedBackwards())
    lora.save_adapter(tmp_path)
    model = nn.Sequential(nn.Linear(4, 3))
    model.load_state_dict(base)
    LoraModel.load_adapter(model, tmp_path, registry=registry_of(NamedBackwards()))
    assert [name for name, _ in lora.model.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("cls", "given"), [(OneRowOfUpdate, r"\(1, 4\)"), (NoUpdate, "None")], ids=["another shape", "no tensor"]
)
def test_an_update_that_is_not_of_the_weight_is_refused(cls, given):
    lora, _ = adapted(cls())
    with pytest.raises(PluginError, match=rf"variant 'gate' gives {given} for '0', where the weight is \(3, 4\)"):
        lora.model(torch.randn(2, 4))


class OtherDora(DoraVariant):
    name = "other_dora"


class Rescales(OtherDora):
    def __init__(self, factors):
        self.factors = factors

    def row_factors(self, direction, own):
        return self.factors


@pytest.mark.parametrize(
    ("factors", "shown"),
    [(torch.ones(1), r"\(1,\)"), (torch.ones(3, 1), r"\(3, 1\)"), (torch.ones(()), r"\(\)"), (2.0, "2.0")],
    ids=["one", "a column", "a scalar", "a number"],
)
def test_row_factors_of_another_shape_are_not_broadcast(factors, shown):
    lora, _ = adapted(Rescales(factors))
    message = rf"row_factors\(\) of the variant 'other_dora' gives {shown} for '0', where the matrix has 3 rows"
    with torch.no_grad(), pytest.raises(PluginError, match=message):
        lora.model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("plugin", "place"),
    [
        (failing(Gate, "delta_weight"), "delta_weight() of the variant 'gate', for '0'"),
        (failing(OtherDora, "row_factors"), "row_factors() of the variant 'other_dora', for '0'"),
    ],
    ids=["delta_weight", "row_factors"],
)
def test_an_error_of_a_variant_in_a_forward_is_told_with_its_place(plugin, place):
    lora, _ = adapted(plugin)
    with pytest.raises(ValueError, match="no license server") as caught:
        lora.model(torch.randn(2, 4))
    assert caught.value.__notes__[0] == f"It was raised in {place}."


def test_a_base_that_is_changed_in_place_comes_back():
    lora, before = adapted(ReturnsInPlace())
    torch.testing.assert_close(lora.model[0]._parameters["weight"], before["0.weight"] * 0.5)
    lora.unload()
    assert torch.equal(lora.model[0].weight, before["0.weight"])


def test_tensors_that_start_as_views_are_trained_by_themselves():
    lora, before = adapted(Views())
    layer = lora.model[0]
    first_A = layer.lora_A["default"].detach().clone()
    with torch.no_grad():
        for name in ("left", "row"):
            getattr(layer, f"lora_{name}")["default"].add_(1)
    assert torch.equal(layer.lora_A["default"], first_A)
    assert torch.equal(layer._parameters["weight"], before["0.weight"])


class KeepsEmpty(TorchFunctionMode):
    """What Fabric.init_module(empty_init=True) enters."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "none"])
def test_block_that_keeps_modules_empty_is_refused_and_nothing_is_touched(init):
    with KeepsEmpty():
        model = nn.Sequential(nn.Linear(4, 3))
        with pytest.raises(StateError, match=r"torch\.nn\.init does nothing here.*after that block"):
            LoraModel(model, LoraConfig(r=2, init=init))
    assert type(model[0]) is nn.Linear
    LoraModel(model, LoraConfig(r=2, init=init))
