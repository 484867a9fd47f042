"""Defects that an author of a layer plugin may build in: the kit finds each of them, in the check that says so."""

import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_plugins import RowMajorPlugin, Slot
from lora_plugins.layers.linear import LinearPlugin
from lora_plugins.testing import CheckError, check_layer_plugin


class Complete(RowMajorPlugin):
    """A plugin for nn.Linear that has everything a layer plugin can have, in plain operations."""

    name = "complete"
    module_type = nn.Linear
    branch_types = (nn.Linear,)
    branch_use = "always"
    branch_takes_delta = True
    parts = LinearPlugin.parts

    def inputs(self, layer, slot, x):
        return x.flatten(0, -2) if x.dim() > 1 else x[None]

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"], layer.bias)
        for term in terms:
            y = y + self.placed(term, self.update(term, x)).to(y.dtype)
        return y

    def update(self, term, x):
        x = term.drop(x).to(term.A.dtype)
        return F.linear(x, term.delta) if term.delta is not None else self.low_rank(term, x)

    def low_rank(self, term, x):
        return F.linear(F.linear(x, term.A), term.B) * term.scaling

    def placed(self, term, update):
        start, stop, total = term.slot.rows or (0, update.shape[-1], update.shape[-1])
        return F.pad(update, (start, total - stop))

    def mixed(self, layer, base, adapters, x):
        y = F.linear(x, base["weight"], layer.bias)
        A, B = adapters.A[adapters.index], adapters.B[adapters.index]
        rows = x.reshape(len(x), x.shape[1:-1].numel(), x.shape[-1]).to(A.dtype)
        return y + (rows @ A.mT @ B.mT).reshape(y.shape).to(y.dtype)


class MixedFirstOnly(Complete):
    def mixed(self, layer, base, adapters, x):
        return super().mixed(layer, base, replace(adapters, index=torch.zeros_like(adapters.index)), x)


class MixedWithoutBaseRows(Complete):
    """Takes the last adapter where a row has none."""

    def mixed(self, layer, base, adapters, x):
        return super().mixed(layer, base, replace(adapters, index=adapters.index.clamp(max=len(adapters.A) - 2)), x)


class MixedWithoutBias(Complete):
    def mixed(self, layer, base, adapters, x):
        y = super().mixed(layer, base, adapters, x)
        return y if layer.bias is None else y - layer.bias


class MixedInHalf(Complete):
    def mixed(self, layer, base, adapters, x):
        return super().mixed(layer, base, replace(adapters, A=adapters.A.to(x.dtype), B=adapters.B.to(x.dtype)), x)


class MixedReturnsFloat(Complete):
    def mixed(self, layer, base, adapters, x):
        return super().mixed(layer, base, adapters, x).to(adapters.A.dtype)


class DetachedBias(Complete):
    def branch(self, layer, base, terms, x):
        y = super().branch(layer, base, terms, x)
        return y if layer.bias is None else y - layer.bias + layer.bias.detach()


class DropsAfterA(Complete):
    def update(self, term, x):
        return F.linear(term.drop(F.linear(x.to(term.A.dtype), term.A)), term.B) * term.scaling


class DropsTheUpdate(Complete):
    def update(self, term, x):
        return term.drop(super().update(replace(term, training=False), x))


class OwnMask(Complete):
    """Drops what it should, by numbers that torch's seed does not decide."""

    def update(self, term, x):
        if term.training and term.dropout:
            kept = torch.as_tensor(self.numbers(x.numel())).reshape(x.shape) >= term.dropout
            x = x * kept.to(x.dtype) / (1 - term.dropout)
        return super().update(replace(term, training=False), x)


class MaskFromNumpy(OwnMask):
    def numbers(self, count):
        return np.random.rand(count)


class MaskFromPython(OwnMask):
    def numbers(self, count):
        return [random.random() for _ in range(count)]


class MaskFromItsOwnGenerator(OwnMask):
    generator = torch.Generator().manual_seed(0)

    def numbers(self, count):
        return torch.rand(count, generator=self.generator)


class OneMaskForAllRows(Complete):
    def update(self, term, x):
        mask = term.drop(torch.ones_like(x.flatten(0, -2)[0]))
        return super().update(replace(term, training=False), x * mask)


class DoubledInputs(Complete):
    def inputs(self, layer, slot, x):
        return 2 * super().inputs(layer, slot, x)


class ReversedInputs(Complete):
    """The vectors of a whole batch span everything in any order."""

    def inputs(self, layer, slot, x):
        return super().inputs(layer, slot, x).flip(-1)


class FewerInputs(Complete):
    """Leaves the vectors of the last row out, which the others happen to span."""

    def inputs(self, layer, slot, x):
        return super().inputs(layer, slot, x[:-1])


class NoBiases(Complete):
    def biases(self, layer):
        return ()


class MisspeltBiases(Complete):
    def biases(self, layer):
        return ("bais",)


class WeightAsBias(Complete):
    def biases(self, layer):
        return ("weight", "bias")


class CastsDown(Complete):
    def low_rank(self, term, x):
        half = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
        return super().low_rank(replace(term, A=term.A.to(half).to(x.dtype), B=term.B.to(half).to(x.dtype)), x)


def halved(term):
    """Returns a term whose A gets half of its gradient."""
    return replace(term, A=term.A.detach() + 0.5 * (term.A - term.A.detach()))


class HalvesGradientsInHalf(Complete):
    """As a backward of its own may; in float64 it is right."""

    def branch(self, layer, base, terms, x):
        half = base["weight"].dtype in (torch.bfloat16, torch.float16)
        return super().branch(layer, base, [halved(term) for term in terms] if half else terms, x)


class HalvesGradientsUnderAutocast(Complete):
    def low_rank(self, term, x):
        return super().low_rank(halved(term) if torch.is_autocast_enabled(x.device.type) else term, x)


class CastsTheMiddleDown(Complete):
    """In float64 it is right; on a base in half precision, A(x) is rounded."""

    def branch(self, layer, base, terms, x):
        self_dtype = x.dtype
        y = F.linear(x, base["weight"], layer.bias)
        for term in terms:
            if term.delta is not None:
                y = y + self.placed(term, self.update(term, x)).to(y.dtype)
                continue
            middle = F.linear(term.drop(x).to(term.A.dtype), term.A).to(self_dtype)
            y = y + self.placed(term, F.linear(middle.to(term.B.dtype), term.B) * term.scaling).to(y.dtype)
        return y


class WrongWithoutGradients(Complete):
    def low_rank(self, term, x):
        return super().low_rank(term, x) * (1 if torch.is_grad_enabled() else 1.01)


class WrongInInference(Complete):
    def low_rank(self, term, x):
        return super().low_rank(term, x) * (1.01 if torch.is_inference_mode_enabled() else 1)


class IgnoresDelta(Complete):
    def update(self, term, x):
        return self.low_rank(term, term.drop(x).to(term.A.dtype))


class DropsNothingOfADelta(Complete):
    def update(self, term, x):
        return F.linear(x.to(term.A.dtype), term.delta) if term.delta is not None else super().update(term, x)


# Invented: what else an author may get wrong.


class OtherScalingInTraining(Complete):
    def low_rank(self, term, x):
        return super().low_rank(term, x) * (1.5 if term.training else 1)


class ScalesByAlphaOverR(Complete):
    """Right for the usual scaling, wrong with rsLoRA."""

    def low_rank(self, term, x):
        alpha = term.settings.alpha
        return F.linear(F.linear(x, term.A), term.B) * (alpha / len(term.A))


class WritesIntoItsInput(Complete):
    def branch(self, layer, base, terms, x):
        y = super().branch(layer, base, terms, x)
        with torch.no_grad():
            x.mul_(1.001)
        return y


class AddsIntoItsInput(Complete):
    """A square layer's output takes the place of its input."""

    def branch(self, layer, base, terms, x):
        y = super().branch(layer, base, terms, x)
        if not torch.is_grad_enabled() and y.shape == x.shape:
            return x.copy_(y)
        return y


STORED = {}


class KeepsTheBaseWeight(Complete):
    """Copies the weight of a layer once, and never looks again."""

    def branch(self, layer, base, terms, x):
        if torch.compiler.is_compiling():
            return super().branch(layer, base, terms, x)
        owner, weight = STORED.get(id(terms[0].A), (None, None))
        if owner is None or owner() is not terms[0].A or weight.dtype != x.dtype:
            owner, weight = STORED[id(terms[0].A)] = (weakref.ref(terms[0].A), base["weight"].clone())
        return super().branch(layer, {"weight": weight}, terms, x)


PRODUCTS = {}


class KeepsTheProduct(Complete):
    """Multiplies B and A once where no gradients are needed, and never again."""

    def low_rank(self, term, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().low_rank(term, x)
        owner, product = PRODUCTS.get(id(term.A), (None, None))
        if owner is None or owner() is not term.A:
            owner, product = PRODUCTS[id(term.A)] = (weakref.ref(term.A), term.B @ term.A)
        return F.linear(x, product) * term.scaling


class KeepsTheProductInInference(KeepsTheProduct):
    def low_rank(self, term, x):
        return super().low_rank(term, x) if torch.is_inference_mode_enabled() else Complete.low_rank(self, term, x)


class KeepsTheProductInTraining(KeepsTheProduct):
    def low_rank(self, term, x):
        return super().low_rank(term, x) if term.training else Complete.low_rank(self, term, x)


class ReadsTheRawWeight(Complete):
    """Past `base`, which may hold merged updates."""

    def branch(self, layer, base, terms, x):
        return super().branch(layer, {"weight": layer._parameters["weight"]}, terms, x)


class FailsUnderAutocast(Complete):
    """Adds what autocast computed in bfloat16 into a tensor of the input's type."""

    def low_rank(self, term, x):
        y = super().low_rank(term, x)
        return x.new_zeros(y.shape).index_add(0, torch.arange(len(y), device=y.device), y)


class BatchOfAtLeastOne(Complete):
    def low_rank(self, term, x):
        x.flatten(0, -2).max()
        return super().low_rank(term, x)


class OnlyBatches(Complete):
    def low_rank(self, term, x):
        batch, *_ = x.shape[:-1]
        return super().low_rank(term, x.reshape(batch, -1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class ForRowsWithoutGradients(Complete):
    """Has another way where no gradients are computed, which takes matrices only."""

    def low_rank(self, term, x):
        return super().low_rank(term, x) * (torch.is_grad_enabled() or x.dim() == 2)


class ViewsItsInput(Complete):
    def low_rank(self, term, x):
        return super().low_rank(term, x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class DrawsInTheBranch(Complete):
    def low_rank(self, term, x):
        if not torch.compiler.is_compiling():
            torch.rand(1)
        return super().low_rank(term, x)


class ForgetsTheRows(Complete):
    """Puts the update of a part on the first rows, wherever the part lies."""

    def placed(self, term, update):
        total = term.slot.rows[2] if term.slot.rows else update.shape[-1]
        return F.pad(update, (0, total - update.shape[-1]))


class OneSlotForAllTerms(Complete):
    """Right while all adapters have the same parts."""

    def branch(self, layer, base, terms, x):
        return super().branch(layer, base, [replace(term, slot=terms[0].slot) for term in terms], x)


KEPT = []


class KeepsItsInputs(Complete):
    def low_rank(self, term, x):
        KEPT.append(x)
        return super().low_rank(term, x)


class SwitchesGradientsOff(Complete):
    def branch(self, layer, base, terms, x):
        y = super().branch(layer, base, terms, x)
        if not torch.compiler.is_compiling():
            torch.set_grad_enabled(True)
        return y


class WithoutGradientsInEvalMode(Complete):
    def branch(self, layer, base, terms, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and layer.training):
            return super().branch(layer, base, terms, x)


class WritesIntoA(Complete):
    def low_rank(self, term, x):
        y = super().low_rank(term, x)
        with torch.no_grad():
            term.A.mul_(1.0001)
        return y


class OverlappingParts(Complete):
    def parts(self, layer):
        return {
            "q": Slot("weight", "q", (0, 4, layer.out_features)),
            "k": Slot("weight", "k", (3, 6, layer.out_features)),
        }


class OverlappingSlots(OverlappingParts):
    def slots(self, layer):
        return [*super().parts(layer).values()]

    def parts(self, layer):
        return {}


class FailsOnChannelsThatDoNotNeedGradients(Complete):
    """Saves for the backward what only a training forward has."""

    def low_rank(self, term, x):
        if torch.is_grad_enabled() and not term.A.requires_grad:
            raise RuntimeError("no A to train")
        return super().low_rank(term, x)


class Doubles(Complete):
    """Computes where values should only be moved, and takes it back."""

    def to_matrix(self, weight):
        return super().to_matrix(weight) * 2

    def from_matrix(self, matrix, shape):
        return super().from_matrix(matrix / 2, shape)


class FirstTwo(Complete):
    def branch(self, layer, base, terms, x):
        return super().branch(layer, base, terms[:2], x)


class MixesTwo(Complete):
    """Takes the base for an adapter behind the second."""

    def mixed(self, layer, base, adapters, x):
        last = len(adapters.A) - 1
        index = torch.where(adapters.index < 2, adapters.index, last)
        return super().mixed(layer, base, replace(adapters, index=index), x)


class OneMaskForAllTerms(Complete):
    """Drops as the first adapter says, for all of them."""

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"], layer.bias)
        dropped = terms[0].drop(x)
        for term in terms:
            y = y + self.placed(term, self.update(replace(term, training=False), dropped)).to(y.dtype)
        return y


class KindOfTheFirst(Complete):
    """Takes all adapters for those of a variant where the first one is of one."""

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"], layer.bias)
        for term in terms:
            update = self.update if terms[0].delta is not None else self.low_rank
            y = y + self.placed(term, update(term, term.drop(x).to(term.A.dtype))).to(y.dtype)
        return y


class DetachesADelta(Complete):
    def update(self, term, x):
        return super().update(replace(term, delta=None if term.delta is None else term.delta.detach()), x)


class DetachesARescaling(LinearPlugin):
    def branch(self, layer, base, terms, x):
        if (how := terms[0].rescaling) is not None:
            terms = [replace(terms[0], rescaling=replace(how, own=[each.detach() for each in how.own]))]
        return super().branch(layer, base, terms, x)


class DetachesWhatItDrops(Complete):
    def update(self, term, x):
        return super().update(replace(term, A=term.A.detach()) if term.dropout else term, x)


class MixedWithoutFactors(LinearPlugin):
    """Takes an adapter of a variant for a plain one."""

    def mixed(self, layer, base, adapters, x):
        return super().mixed(layer, base, replace(adapters, factors=None), x)


PLANTED = {
    MixedWithoutBaseRows: "mixed",
    MixedWithoutBias: "mixed",
    MixedInHalf: "mixed",
    MixedReturnsFloat: "mixed",
    DetachedBias: "gradients",
    WithoutGradientsInEvalMode: "gradients",
    DropsAfterA: "dropout",
    DropsTheUpdate: "dropout",
    OneMaskForAllRows: "dropout",
    MaskFromNumpy: "dropout",
    MaskFromPython: "dropout",
    MaskFromItsOwnGenerator: "dropout",
    DoubledInputs: "inputs",
    FewerInputs: "inputs",
    MisspeltBiases: "biases",
    WeightAsBias: "biases",
    CastsDown: "dtype",
    CastsTheMiddleDown: "dtype",
    HalvesGradientsInHalf: "dtype",
    HalvesGradientsUnderAutocast: "dtype",
    WrongWithoutGradients: "law",
    WrongInInference: "law",
    DropsNothingOfADelta: "variant",
    OtherScalingInTraining: "law",
    ScalesByAlphaOverR: "law",
    WritesIntoItsInput: "pure",
    AddsIntoItsInput: "pure",
    KeepsTheBaseWeight: "pure",
    KeepsTheProduct: "pure",
    KeepsTheProductInInference: "pure",
    KeepsTheProductInTraining: "pure",
    FailsUnderAutocast: "dtype",
    BatchOfAtLeastOne: "calls",
    ViewsItsInput: "calls",
    ForRowsWithoutGradients: "calls",
    ForgetsTheRows: "law",
    OneSlotForAllTerms: "several",
    KeepsItsInputs: "pure",
    SwitchesGradientsOff: "pure",
    WritesIntoA: "pure",
    OverlappingParts: "layout",
    OverlappingSlots: "layout",
    Doubles: "layout",
    MixesTwo: "mixed",
    FailsOnChannelsThatDoNotNeedGradients: "law",
    OneMaskForAllTerms: "dropout",
    KindOfTheFirst: "variant",
    DetachesADelta: "variant",
    DetachesARescaling: "variant",
    DetachesWhatItDrops: "dropout",
    MixedWithoutFactors: "mixed",
}
"""By defect, the check that is about it; others may find it too. More are in `test_layer_violations`."""


def check(plugin, *names):
    check_layer_plugin(
        plugin,
        lambda **options: nn.Linear(9, 9, **options),
        lambda layer: torch.randn(4, 3, 9),
        options=[{}, {"bias": False}],
        only=names or None,
    )


class MisspeltSlot(Complete):
    def slots(self, layer):
        return (Slot("wieght"),)


class MisspeltPart(Complete):
    def parts(self, layer):
        return {"q": Slot("wieght", "q", (0, 3, 9))}


@pytest.mark.parametrize("name", ["registration", "layout"])
@pytest.mark.parametrize("cls", [MisspeltSlot, MisspeltPart])
def test_a_misspelt_weight_is_told_with_a_near_one(cls, name):
    said = r"names the weight 'wieght', which [\w ']+\. Did you mean 'weight'\?"
    with pytest.raises(CheckError, match=said):
        check(cls(), name)


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_wrong():
    check(Complete())


@pytest.mark.parametrize("cls", PLANTED, ids=lambda cls: cls.__name__)
def test_a_planted_defect_is_found(cls):
    with pytest.raises(CheckError, match=f"fails the check '{PLANTED[cls]}'"):
        check(cls(), PLANTED[cls])


class DropsTheFirstInput(RowMajorPlugin):
    """A plugin for a layer that multiplies its inputs, so that each alone, with zeros for the other, gives nothing."""

    name = "product"
    module_type = nn.Bilinear
    branch_types = (nn.Bilinear,)
    branch_use = "always"

    def branch(self, layer, base, terms, x1, x2):
        y = F.bilinear(x1, x2, base["weight"], layer.bias)
        for term in terms:
            y = y + (term.scaling * self.update(term, x1.to(term.A.dtype), x2.to(term.A.dtype))).to(y.dtype)
        return y

    def update(self, term, x1, x2):
        return F.linear(self.forms(term, term.drop(x1), x2), term.B)

    def forms(self, term, x1, x2):
        return F.linear((x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2), term.A)


class DropsTheSecondInput(DropsTheFirstInput):
    def update(self, term, x1, x2):
        return F.linear(self.forms(term, x1, term.drop(x2)), term.B)


class DropsProducts(DropsTheFirstInput):
    def update(self, term, x1, x2):
        return F.linear(F.linear(term.drop((x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)), term.A), term.B)


class DropsForms(DropsTheFirstInput):
    def update(self, term, x1, x2):
        return F.linear(term.drop(self.forms(term, x1, x2)), term.B)


class DropsOutputs(DropsTheFirstInput):
    def update(self, term, x1, x2):
        return term.drop(F.linear(self.forms(term, x1, x2), term.B))


class DropsBoth(DropsTheFirstInput):
    def update(self, term, x1, x2):
        return F.linear(self.forms(term, term.drop(x1), term.drop(x2)), term.B)


class DropsAllRows(DropsTheFirstInput):
    def update(self, term, x1, x2):
        return F.linear(self.forms(term, x1 * term.drop(torch.ones_like(x1[:1])), x2), term.B)


def check_product(plugin, name):
    pair = (torch.Size([5, 3]), torch.Size([5, 4]))
    check_layer_plugin(plugin, lambda: nn.Bilinear(3, 4, 6), lambda layer: tuple(map(torch.randn, pair)), only=[name])


@pytest.mark.parametrize("cls", [DropsTheFirstInput, DropsTheSecondInput, DropsProducts], ids=lambda cls: cls.__name__)
def test_a_layer_that_multiplies_its_inputs_may_drop_any_of_them(cls):
    check_product(cls(), "dropout")


@pytest.mark.parametrize("cls", [DropsForms, DropsOutputs, DropsBoth, DropsAllRows], ids=lambda cls: cls.__name__)
def test_what_else_it_drops_is_found(cls):
    with pytest.raises(CheckError, match="fails the check 'dropout'"):
        check_product(cls(), "dropout")
