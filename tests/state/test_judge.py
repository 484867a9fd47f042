"""The judge can fail: it finds planted defects, and the reference computes what is written out by hand."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lora_plugins import STORAGES, LoraError, LoraModel, build_registry
from tests.state.__main__ import Tally, walk
from tests.state.checks import DivergenceError
from tests.state.machine import Machine, opened
from tests.state.reference import Reference
from tests.state.rules import Step
from tests.state.script import script
from tests.state.shrink import Case
from tests.state.spec import Spec
from tests.state.stored import not_nearest
from tests.state.zoo import batch, build


class ForgetsTrainable(LoraModel):
    def set_adapter(self, adapter_names, *, trainable=True):
        super().set_adapter(adapter_names)


class ActivatesOne(LoraModel):
    def set_adapter(self, adapter_names, *, trainable=True):
        names = adapter_names if isinstance(adapter_names, str) else adapter_names[:1]
        super().set_adapter(names, trainable=trainable)


class ChangesWhenRefused(LoraModel):
    def set_adapter(self, adapter_names, *, trainable=True):
        try:
            super().set_adapter(adapter_names, trainable=trainable)
        except LoraError:
            self.model.requires_grad_(False)
            raise


class UnloadsFrozen(LoraModel):
    def unload(self, **options):
        return super().unload(**options).requires_grad_(False)


class UnmergesAlmost(LoraModel):
    def unmerge_adapter(self):
        super().unmerge_adapter()
        with torch.no_grad():
            next(self.model.parameters()).mul_(1 + 1e-15)


class DisablesNothing(LoraModel):
    @contextmanager
    def disable_adapter(self):
        yield self.model


class MixesBackwards(LoraModel):
    def mixed_batch(self, adapter_names):
        return super().mixed_batch(adapter_names[::-1])


class SavesAnother(LoraModel):
    def save_adapter(self, path, adapter_name=None):
        return super().save_adapter(path, next(iter(self.adapters)))


class LoadsRounded(LoraModel):
    @classmethod
    def load_adapter(cls, model, path, adapter_name=None, **options):
        handle = super().load_adapter(model, path, adapter_name, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(parameter.bfloat16())
        return handle


class CombinesSquares(LoraModel):
    def add_weighted_adapter(self, adapters, weights, *rest, **options):
        return super().add_weighted_adapter(adapters, [w * w for w in weights], *rest, **options)


class MergesDouble(LoraModel):
    def merge_and_unload(self, **options):
        bases = {name: p.detach().clone() for name, p in self.model.named_parameters() if ".lora_" not in name}
        model = super().merge_and_unload(**options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in bases:
                    parameter.add_(parameter - bases[name])
        return model


@pytest.mark.parametrize(
    "kind",
    [
        ForgetsTrainable,
        ActivatesOne,
        ChangesWhenRefused,
        UnloadsFrozen,
        UnmergesAlmost,
        LoadsRounded,
        # Those that a walk meets late.
        pytest.param(DisablesNothing, marks=pytest.mark.slow),
        pytest.param(MixesBackwards, marks=pytest.mark.slow),
        pytest.param(SavesAnother, marks=pytest.mark.slow),
        pytest.param(CombinesSquares, marks=pytest.mark.slow),
        pytest.param(MergesDouble, marks=pytest.mark.slow),
    ],
)
def test_planted_defects_are_found(kind):
    tally = Tally()
    for run in range(100):
        walk(f"planted.{run}", torch.float64, tally, kind=kind)
        if tally.found:
            return
    pytest.fail("not found")


def test_a_value_that_was_away_during_a_cast_was_rounded_before(tmp_path):
    """LoftQ computes it in the type of the model; a wider one that comes later has not seen that."""
    machine = Machine(("norms",), torch.float32, 312, tmp_path)
    machine.do(Step("add", {"name": "a", "spec": Spec(("norms.outer",), alpha=4.0)}))
    machine.do(Step("add", {"name": "b", "spec": Spec(("norms.outer",), alpha=4.0, init="loftq")}))
    machine.do(Step("cast", {"dtype": "float64"}))
    machine.do(Step("set", {"names": ("b",)}))


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_stored_weight_with_nan_is_not_the_nearest(name):
    plugin = build_registry(allow=[]).of(STORAGES)[name].plugin
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    tensors = dict(plugin.store(weight, plugin.options))
    assert not not_nearest(name, tensors, weight, torch.float32)
    tensors["scale_maxima"] = tensors["scale_maxima"] * torch.nan
    assert not_nearest(name, tensors, weight, torch.float32)


CALLS = (
    Step("look", {"spec": Spec(("linear.proj",))}),
    Step("add", {"name": "a", "spec": Spec(("linear.proj",), bias="lora_only")}),
    Step("scramble", {"name": "a", "seed": 1}),
    Step("train_step"),
    Step("save", {"slot": 0, "name": "a"}),
    Step("snap"),
    Step("train_step"),
    Step("load_own"),
    Step("load", {"slot": 0, "name": "b"}),
    Step("load_own"),
    Step("combine", {"adapters": ("a",), "weights": (0.5,), "name": "c"}),
    Step("set", {"names": ("b",)}),
    Step("train_step"),
    Step("copy", {"way": "pickle", "keep": "copy"}),
    Step("train_step"),
    Step("copy", {"way": "deepcopy", "keep": "original"}),
    Step("swap", {"slot": 0, "name": "a"}),
    Step("disable"),
    Step("close", {"failing": True}),
    Step("merge", {"names": None}),
    Step("unmerge"),
    Step("delete", {"name": "c"}),
    Step("mode", {"training": True}),
    Step("forward"),
    Step("backward"),
    Step("cast", {"dtype": "float32"}),
    Step("lay_out", {"channels_last": True}),
    Step("merge_and_unload"),
    Step("load_base", {"seed": 1}),
    Step("load_base", {"seed": None}),
    Step("add", {"name": "d", "spec": Spec(("linear.proj",))}),
    Step("unload"),
    Step("add", {"name": "e", "spec": Spec(("linear.proj",))}),
    Step("train_step"),
)


@pytest.mark.parametrize("steps", [CALLS[:count] for count in (8, 16, 28, len(CALLS))], ids=len)
def test_a_script_does_what_the_machine_does(steps):
    with opened(("linear",), torch.float64, 0) as machine:
        for step in steps:
            assert machine.do(step) == "done"
    found = {}
    exec(script(Case(machine.blocks, torch.float64, 0, steps), steps[-1], DivergenceError("check", "detail")), found)
    torch.testing.assert_close(found["model"].state_dict(), machine.model.state_dict(), rtol=0, atol=0)


def adapter_of(reference, name, spec, generator):
    """Gives the reference an adapter with random tensors."""
    adapter = reference.plan(spec)
    for slot in adapter.slots:
        rows, columns = slot.matrix(reference.base[slot.weight]).shape
        for factor, shape in {"A": (slot.r, columns), "B": (rows, slot.r), "magnitude": (rows,)}.items():
            adapter.tensors[slot.key(factor)] = torch.randn(shape, generator=generator, dtype=torch.float64)
    reference.adapters[name], reference.active = adapter, (*reference.active, name)
    return adapter


def test_reference_of_a_linear_layer():
    model, (x, tokens) = build(("linear",)), batch(torch.float64)
    reference, generator = Reference(model, ("linear",)), torch.Generator().manual_seed(0)
    a = adapter_of(reference, "a", Spec(("linear.proj",), r=2, alpha=3.0), generator)
    b = adapter_of(reference, "b", Spec(("linear.proj",), r=4, alpha=1.0, rslora=True), generator)
    proj, h = model.linear.proj, x.view(-1, 3, 4)
    expected = h @ proj.weight.T + proj.bias
    for adapter, scaling in ((a, 3 / 2), (b, 1 / 2)):
        A, B = (adapter.tensors[f"linear.proj.lora_{factor}"] for factor in "AB")
        expected = expected + scaling * (h @ A.T) @ B.T
    torch.testing.assert_close(reference.run(x, tokens, training=False).outputs["linear"], expected)


def test_reference_of_an_embedding():
    model, (x, tokens) = build(("embedding",)), batch(torch.float64)
    reference = Reference(model, ("embedding",))
    adapter = adapter_of(reference, "a", Spec(("embedding.embed",), alpha=2.0), torch.Generator().manual_seed(0))
    A, B = (adapter.tensors[f"embedding.embed.lora_{factor}"] for factor in "AB")
    expected = model.embedding.embed(tokens) + A.T[tokens] @ B.T
    torch.testing.assert_close(reference.run(x, tokens, training=False).outputs["embedding"], expected)


def test_reference_of_dora_on_a_part():
    model, (x, tokens) = build(("fused",)), batch(torch.float64)
    reference, spec = Reference(model, ("fused",)), Spec(("fused.qkv",), parts={"fused.qkv": ("k",)}, variant="dora")
    adapter = adapter_of(reference, "a", spec, torch.Generator().manual_seed(0))
    A, B, m = (adapter.tensors[f"fused.qkv.lora_{factor}_k"] for factor in ("A", "B", "magnitude"))
    weight = model.fused.qkv.weight.detach().clone()
    direction = weight[2:4] + 2 * B @ A
    weight[2:4] = m[:, None] * nn.functional.normalize(direction)
    expected = x.view(-1, 3, 4) @ weight.T
    torch.testing.assert_close(reference.run(x, tokens, training=False).outputs["fused"], expected)


def test_reference_of_rows_and_of_the_base():
    model, (x, tokens) = build(("linear",)), batch(torch.float64)
    reference = Reference(model, ("linear",))
    adapter_of(reference, "a", Spec(("linear.proj",)), torch.Generator().manual_seed(0))
    adapted = reference.run(x, tokens, training=False).outputs["linear"]
    base = model.linear(x, tokens)
    reference.contexts.append(("a", None, "a"))
    rows = reference.run(x, tokens, training=False).outputs["linear"]
    torch.testing.assert_close(rows, torch.stack([adapted[0], base[1], adapted[2]]))
    reference.contexts.append(None)
    torch.testing.assert_close(reference.run(x, tokens, training=False).outputs["linear"], base)
