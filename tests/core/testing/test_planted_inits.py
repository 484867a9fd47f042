"""Defects that an author of an init may build in: the kit finds each of them, in the check that says so."""

import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lora_plugins import InitPlugin, TargetError
from lora_plugins.plugins import INITS, default_registry
from lora_plugins.testing import CheckError, check_init_plugin


class Plain(InitPlugin):
    """A normal A and a zero B."""

    name = "plain"
    options: ClassVar = {"gains": [1.0]}

    def fill(self, context):
        nn.init.normal_(context.A, generator=context.generator)
        context.B.zero_()
        return {}


class DrawsInTheDefaultType(Plain):
    def fill(self, context):
        context.A.copy_(torch.randn(context.A.shape, generator=context.generator, device="cpu"))
        context.B.zero_()
        return {}


class Changing(Plain):
    """Takes a rank-one piece out of the base and gives it to the adapter."""

    name = "changing"
    changes_base = True

    def fill(self, context):
        nn.init.normal_(context.A, std=0.1, generator=context.generator)
        nn.init.normal_(context.B, std=0.1, generator=context.generator)
        return {"A": context.A.clone(), "B": context.B.clone()}

    def changed_base(self, weight, recipe, scaling, options):
        return (weight.double() - scaling * recipe["B"].double() @ recipe["A"].double()).to(weight.dtype)


class Rounding(Changing):
    """Rounds what is left of the base, which the adapter does not make up for."""

    def changed_base(self, weight, recipe, scaling, options):
        left = super().changed_base(weight, recipe, scaling, options)
        step = left.abs().amax(1, keepdim=True) / 3
        return (left / step).round() * step


class TakesHalf(Changing):
    def changed_base(self, weight, recipe, scaling, options):
        return super().changed_base(weight, recipe, scaling / 2, options)


class Triples(Plain):
    """Puts another base in the place of the model's, which no few ranks could make up for."""

    changes_base = True

    def changed_base(self, weight, recipe, scaling, options):
        return 3 * weight


class TakesWhatItDoesNotGive(Plain):
    """Out of the base, and starts as others do."""

    changes_base = True

    def fill(self, context):
        super().fill(context)
        return {"A": context.A.clone()}

    def changed_base(self, weight, recipe, scaling, options):
        return weight - torch.ones_like(weight[:, :1]) * recipe["A"][:1].to(weight.dtype) / 8


class FourRanks(Plain):
    """Starts four of them, and leaves the others at zero."""

    def fill(self, context):
        context.A.zero_()
        context.B.zero_()
        nn.init.normal_(context.A[:4], generator=context.generator)
        return {}


class TakesFourRanks(Changing):
    """Takes no more than four of the ranks out of the base."""

    def changed_base(self, weight, recipe, scaling, options):
        four = {"A": recipe["A"][:4], "B": recipe["B"][:, :4]}
        return super().changed_base(weight, four, scaling, options)


class DrawsFromPython(Plain):
    def fill(self, context):
        super().fill(context)
        context.A.mul_(1 + random.random())
        return {}


class DrawsFromNumpy(Plain):
    def fill(self, context):
        super().fill(context)
        context.A.mul_(1 + np.random.rand())
        return {}


class MovesPythonsNumbers(Plain):
    """Seeds what it draws from, and leaves it so."""

    def fill(self, context):
        random.seed(0)
        return super().fill(context)


class DependsOnTheOrder(Plain):
    """Scales the first layer of a model, whichever comes first."""

    last: ClassVar[list] = []

    def fill(self, context):
        super().fill(context)
        if not self.last or self.last[-1] == "conv2d":
            context.A.mul_(2)
        self.last.append(context.layer)
        return {}


class DrawsFromOneGenerator(Plain):
    """A generator of the plugin, which goes on from layer to layer."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def fill(self, context):
        nn.init.normal_(context.A, generator=self.generator)
        context.B.zero_()
        return {}


class WritesItsOptions(Plain):
    def fill(self, context):
        context.options["gains"].append(2.0)
        return super().fill(context)


class WritesTheCalibration(Plain):
    needs = "inputs"

    def fill(self, context):
        context.calibration.inputs.gram.div_(context.calibration.inputs.count)
        return super().fill(context)


class RandomBase(Changing):
    def changed_base(self, weight, recipe, scaling, options):
        return super().changed_base(weight, recipe, scaling, options) + 1e-3 * torch.rand(weight.shape)


class SeededRandomBase(Changing):
    """The same each time, from a seed that is the process's."""

    def changed_base(self, weight, recipe, scaling, options):
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(torch.initial_seed() % 2**31))
        return super().changed_base(weight, recipe, scaling, options) + 1e-6 * noise


class ChangedInPlace(Changing):
    def changed_base(self, weight, recipe, scaling, options):
        return weight.sub_((scaling * recipe["B"].double() @ recipe["A"].double()).to(weight.dtype))


class WritesTheRecipe(Changing):
    def changed_base(self, weight, recipe, scaling, options):
        recipe["B"].mul_(scaling)
        return weight - recipe["B"] @ recipe["A"]


class KeepsItsRecipe(Changing):
    """In the plugin object, by the shape of the weight."""

    def __init__(self):
        self.kept = {}

    def fill(self, context):
        self.kept[context.weight.shape] = super().fill(context)
        return {}

    def changed_base(self, weight, recipe, scaling, options):
        return super().changed_base(weight, self.kept[weight.shape], scaling, options)


class CountsBases(Changing):
    """Right for the first two computations of a base, and no more."""

    def __init__(self):
        self.calls = 0

    def changed_base(self, weight, recipe, scaling, options):
        self.calls += 1
        return super().changed_base(weight, recipe, scaling, options) + (self.calls > 6) * 1e-3


class Remembers(Plain):
    """Starts a layer as the layer of that name that it started last."""

    kept: ClassVar[dict] = {}

    def fill(self, context):
        super().fill(context)
        context.A.copy_(self.kept.setdefault((context.layer, context.A.shape, context.A.dtype), context.A.clone()))
        return {}


class DrawsOneRow(Plain):
    """One row for all ranks: the update has rank 1 however long it is trained."""

    def fill(self, context):
        row = torch.randn(1, context.A.shape[1], generator=context.generator)
        context.A.copy_(row.expand_as(context.A))
        context.B.zero_()
        return {}


class DrawsOneRowAndColumn(Changing):
    """Both factors have one rank, of other sizes."""

    def fill(self, context):
        sizes = torch.arange(1.0, len(context.A) + 1)
        super().fill(context)
        context.A.copy_(sizes[:, None] * context.A[:1])
        context.B.copy_(sizes * context.B[:, :1])
        return {"A": context.A.clone(), "B": context.B.clone()}


class RepeatsTheLastRank(Plain):
    """The sum of two ranks, which is none of its own."""

    def fill(self, context):
        super().fill(context)
        if len(context.A) > 2:
            context.A[-1] = context.A[0] + context.A[1]
        return {}


class OneRowAndAllColumns(Plain):
    """The update starts with one rank, and gets the others: the columns of B are no combinations of each other."""

    identity = False

    def fill(self, context):
        nn.init.normal_(context.B, generator=context.generator)
        row = torch.empty_like(context.A[:1]).normal_(generator=context.generator)
        context.A.copy_(row.expand_as(context.A))
        return {}


class LikeRowsOfLikeColumns(Plain):
    """Rows and columns repeat, but not in the same proportion, so that two ranks are two."""

    identity = False

    def fill(self, context):
        nn.init.normal_(context.A, generator=context.generator)
        nn.init.normal_(context.B, generator=context.generator)
        context.A[1:2] = context.A[:1]
        context.B[:, 1:2] = 2 * context.B[:, :1]
        return {}


class DividesByTheWeight(Plain):
    def fill(self, context):
        super().fill(context)
        context.A.div_(context.weight.norm(dim=0))
        return {}


class DividesByTheInputs(Plain):
    needs = "inputs"

    def fill(self, context):
        super().fill(context)
        context.A.div_(context.calibration.inputs.gram.diagonal().sqrt())
        return {}


class DividesByTheGradient(Plain):
    needs = "gradients"

    def fill(self, context):
        super().fill(context)
        context.A.div_(context.calibration.gradient.norm(dim=0))
        return {}


class RefusesZeros(DividesByTheWeight):
    """Right: it says what it cannot do."""

    def fill(self, context):
        if not context.weight.norm(dim=0).all():
            raise TargetError(f"{context.layer!r} has a column of zeros")
        return super().fill(context)


PLANTED = {
    DividesByTheWeight: "filled",
    DividesByTheInputs: "filled",
    DividesByTheGradient: "filled",
    TakesHalf: "identity",
    Triples: "identity",
    TakesWhatItDoesNotGive: "identity",
    FourRanks: "ranks",
    TakesFourRanks: "ranks",
    DrawsInTheDefaultType: "reproducible",
    DrawsFromPython: "reproducible",
    DrawsFromNumpy: "reproducible",
    MovesPythonsNumbers: "reproducible",
    DependsOnTheOrder: "reproducible",
    DrawsFromOneGenerator: "reproducible",
    WritesTheCalibration: "pure",
    RandomBase: "recipe",
    SeededRandomBase: "recipe",
    ChangedInPlace: "recipe",
    WritesTheRecipe: "recipe",
    CountsBases: "recipe",
    Remembers: "seed",
    DrawsOneRow: "trainable",
    DrawsOneRowAndColumn: "trainable",
    RepeatsTheLastRank: "trainable",
}
"""By defect, the check that is about it; others may find it too. More are in `test_init_violations`."""


@pytest.mark.parametrize("cls", [Plain, Changing, Rounding, OneRowAndAllColumns, LikeRowsOfLikeColumns, RefusesZeros])
def test_nothing_is_found_where_nothing_is_wrong(cls):
    check_init_plugin(cls())


@pytest.mark.parametrize("r", [1, 4, 8, 9, 16, 40])
def test_rounding_is_no_defect_at_any_rank(r):
    check_init_plugin(Rounding(), r=r, only=["identity"])


@pytest.mark.parametrize("r", [1, 16, 24, 40])
@pytest.mark.parametrize("name", ["kaiming", "gaussian", "loftq", "pissa", "olora", "eva", "none"])
def test_a_built_in_init_has_every_rank_that_a_weight_has_room_for(name, r):
    """Also where there are more ranks than the weight has."""
    check_init_plugin(default_registry().get(INITS, name), r=r, only=["trainable"])


def test_what_an_earlier_check_leaves_in_the_plugin_object_is_not_there_elsewhere():
    with pytest.raises(CheckError, match="fails the check 'files'"):
        check_init_plugin(KeepsItsRecipe(), only=["base", "files"])


@pytest.mark.parametrize("cls", PLANTED, ids=lambda cls: cls.__name__)
def test_a_planted_defect_is_found(cls):
    with pytest.raises(CheckError):
        check_init_plugin(cls(), only=[PLANTED[cls]])
