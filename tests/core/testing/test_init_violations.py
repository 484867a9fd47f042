"""Each check of the init kit fails on a plugin that breaks exactly it."""

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError
from lora_plugins.testing import INIT_CHECKS, CheckError, check_init_plugin
from tests.core.testing.test_planted_inits import Changing, Plain, WritesItsOptions
from tests.core.testing.violations import assert_explained, failing


class NoName(Plain):
    name = ""


class LeavesARow(Plain):
    """Fills A except for its last row, whatever that holds."""

    def fill(self, context):
        nn.init.normal_(context.A[:-1], generator=context.generator)
        context.B.zero_()
        return {}


class Dead(Plain):
    def fill(self, context):
        super().fill(context)
        context.A[0] = 0
        return {}


class NoIdentity(Plain):
    def fill(self, context):
        super().fill(context)
        context.B.fill_(0.1)
        return {}


class ForgetsScaling(Changing):
    """Right for the scaling of 2 that most checks have, and for no other."""

    def changed_base(self, weight, recipe, scaling, options):
        return super().changed_base(weight, recipe, 2.0, options)


class DrawsFromTheProcess(Plain):
    def fill(self, context):
        super().fill(context)
        context.A.add_(torch.randn(context.A.shape))
        return {}


class SeedsItself(Plain):
    def fill(self, context):
        nn.init.normal_(context.A, generator=torch.Generator().manual_seed(0))
        context.B.zero_()
        return {}


class WritesTheWeight(Plain):
    def fill(self, context):
        context.weight.data[0, 0] += 1e-3  # of which autograd takes no note
        return super().fill(context)


class SharesItsRecipe(Changing):
    def fill(self, context):
        super().fill(context)
        return {"A": context.A, "B": context.B}


class Remembers(Changing):
    """Keeps B in an attribute, as long as the process lives."""

    def __init__(self):
        self.kept = {}

    def fill(self, context):
        recipe = super().fill(context)
        self.kept[context.weight.shape] = recipe["B"]
        return {"A": recipe["A"]}

    def changed_base(self, weight, recipe, scaling, options):
        return super().changed_base(weight, {**recipe, "B": self.kept[weight.shape]}, scaling, options)


class StoresTheUntouchedBase(Changing):
    def base_to_store(self, weight, recipe, scaling, options):
        return weight


class FixedType(Plain):
    def fill(self, context):
        super().fill(context)
        context.A.copy_(context.A @ torch.eye(context.A.shape[1], dtype=torch.float32))
        return {}


class OnDefaultDevice(Plain):
    def fill(self, context):
        super().fill(context)
        context.A.mul_(torch.full((len(context.A), 1), 2.0))
        return {}


class NeedsRank(Plain):
    def fill(self, context):
        U, _, _ = torch.linalg.svd(context.weight.float(), full_matrices=False)
        super().fill(context)
        context.A[:, 0] += U[0][torch.arange(len(context.A))]
        return {}


VIOLATIONS = {
    "registration": (NoName, "'name'"),
    "filled": (LeavesARow, "values of A of 'embedding' are not finite, or unset"),
    "trainable": (Dead, "1 of 4 ranks of 'embedding' are zero in both A and B"),
    "identity": (NoIdentity, "the output differs by up to"),
    "scaling": (ForgetsScaling, "and could be by"),
    "reproducible": (DrawsFromTheProcess, "the random numbers of the process were moved"),
    "pure": (WritesItsOptions, "the options were {'gains': [1.0"),
    "seed": (SeedsItself, "'embedding' starts the same with another seed and another weight"),
    "base": (WritesTheWeight, "changes_base=False, and"),
    "recipe": (SharesItsRecipe, "the recipe is A or B itself"),
    "files": (Remembers, "could not compute the changed base"),
    "stored": (StoresTheUntouchedBase, "and the changed base alone by"),
    "dtype": (FixedType, "expected m1 and m2 to have the same dtype"),
    "device": (OnDefaultDevice, "A of 'embedding' with another default device differs"),
    "ranks": (NeedsRank, "r=40 ended in IndexError"),
}
"""By check: a plugin that breaks it, and what the message says came."""


ALSO = {
    # What everything else stands on.
    "registration": set(INIT_CHECKS) - {"ranks"},
    # Garbage in a factor is neither reproducible nor finite, and has no rank.
    "filled": {
        "device",
        "trainable",
        "reproducible",
        "recipe",
        "base",
        "dtype",
        "ranks",
        "files",
        "identity",
        "scaling",
    },
    # A start that is no identity is none at any scaling or rank. A base that changed unnoticed is not the one on file.
    "identity": {"scaling", "ranks"},
    "base": {"identity", "scaling", "ranks", "files", "pure", "stored"},
    "trainable": {"ranks"},
    "recipe": {"files", "stored"},
    "files": {"stored"},
    # The start is compared in float64.
    "dtype": {"identity", "scaling", "ranks", "device"},
    # Numbers of the process are others each time, and an index is made like any tensor.
    "reproducible": {"device"},
    "ranks": {"device"},
}
"""The other checks that a violation cannot but break."""


def test_every_check_has_a_violation():
    assert set(VIOLATIONS) == set(INIT_CHECKS)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found_by_its_check_and_by_no_other(name):
    plugin = VIOLATIONS[name][0]()
    found = failing(INIT_CHECKS, lambda each: check_init_plugin(plugin, only=[each]))
    assert found - (ALSO.get(name, set()) - {name}) == {name}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_error_says_what_was_expected_what_came_and_what_is_usual(name):
    cls, came = VIOLATIONS[name]
    assert_explained(name, INIT_CHECKS, came, cls, lambda: check_init_plugin(cls(), only=[name]))


def test_an_init_that_is_none_says_so():
    class Declared(NoIdentity):
        identity = False

    check_init_plugin(Declared(), only=["identity"])
    with pytest.raises(CheckError, match="identity=False, and the output is that of the untouched model"):
        check_init_plugin(type("Wrong", (Plain,), {"identity": False})(), only=["identity"])


def test_an_unknown_layer_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match=r"no layer 'linaer'. Did you mean 'linear'"):
        check_init_plugin(Plain(), layers=["linaer"])
