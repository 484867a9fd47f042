"""Each check of the layer kit fails on a plugin that breaks exactly it, and passes on one that breaks nothing."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_plugins import ColumnMajorPlugin, ConfigError, RowMajorPlugin, Slot
from lora_plugins.testing import LAYER_CHECKS, check_layer_plugin
from tests.core.testing.test_planted_layers import (
    DrawsInTheBranch,
    FirstTwo,
    IgnoresDelta,
    MixedFirstOnly,
    NoBiases,
    OnlyBatches,
    ReadsTheRawWeight,
    ReversedInputs,
)
from tests.core.testing.violations import assert_explained, failing


class Good(RowMajorPlugin):
    """A plugin for nn.Linear with a branch."""

    name = "good"
    module_type = nn.Linear
    branch_types = (nn.Linear,)
    branch_use = "always"

    def inputs(self, layer, slot, x):
        return x.flatten(0, -2)

    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"], layer.bias)
        for term in terms:
            y = y + self.update(term, x).to(y.dtype)
        return y

    def update(self, term, x):
        return F.linear(F.linear(term.drop(x).to(term.A.dtype), term.A), term.B) * term.scaling


class OtherClass(Good):
    module_type = nn.Conv2d


class Transposed(Good):
    """Views a square matrix the wrong way round, which inits would see."""

    inputs = RowMajorPlugin.inputs

    def to_matrix(self, weight):
        return weight.flatten(1).T


class NoScaling(Good):
    def update(self, term, x):
        return super().update(term, x) / term.scaling


class Detached(Good):
    """Right values, and a gradient for B alone."""

    def update(self, term, x):
        return F.linear(F.linear(term.drop(x).to(term.A.dtype), term.A.detach()), term.B) * term.scaling


class DropsAll(Good):
    """Drops the input of the base too, whose mean over many draws is right."""

    def branch(self, layer, base, terms, x):
        return super().branch(layer, base, [replace(term, training=False) for term in terms], terms[0].drop(x))


class LossyMerge(Good):
    def from_matrix(self, matrix, shape):
        return matrix.reshape(shape) * (1 if torch.is_grad_enabled() else 1.001)

    def to_matrix(self, weight):
        return weight.flatten(1) / (1 if torch.is_grad_enabled() else 1.001)


class Leaves(Good):
    def branch(self, layer, base, terms, x):
        layer.seen = True
        return super().branch(layer, base, terms, x)


LAST = {}


class RemembersByLayer(Good):
    """Computes again only where the factors changed, whatever the input."""

    def update(self, term, x):
        if term.dropout or x.requires_grad or torch.compiler.is_compiling():
            return super().update(term, x)
        owner, found = LAST.get(id(term.A), (None, {}))
        if owner is None or owner() is not term.A:
            owner, found = LAST[id(term.A)] = (weakref.ref(term.A), {})
        key = (term.A._version, term.B._version, term.A.dtype, x.dtype)
        if key not in found:
            found[key] = super().update(term, x)
        return found[key]


class DottedPart(Good):
    def slots(self, layer):
        return (Slot("weight", "first.half"),)


class WideOutput(Good):
    def branch(self, layer, base, terms, x):
        y = F.linear(x, base["weight"], layer.bias)
        return y + sum(self.update(term, x) for term in terms)


class OnDefaultDevice(Good):
    def update(self, term, x):
        return super().update(term, x) * torch.ones(len(term.B))


class CopiesWrongly(Good):
    def __deepcopy__(self, memo):
        return NoScaling()


class HoldsALock(Good):
    def __init__(self):
        self.lock = threading.Lock()

    def __deepcopy__(self, memo):
        return self


class AsksForAValue(Good):
    def update(self, term, x):
        return super().update(term, x) if x.detach().sum() > -1e9 else None


class NamedByIdentity(Good):
    def slots(self, layer):
        return (Slot("weight", f"part{id(layer)}"),)


class Counts(Good):
    def __init__(self):
        self.calls = 0

    def branch(self, layer, base, terms, x):
        self.calls += 1
        return super().branch(layer, base, terms, x)


class KeepsItsBias(Good):
    function = F.linear

    def branch(self, layer, base, terms, x):
        output = super().branch(layer, base, terms, x)
        return output + (layer._parameters["bias"] - layer.bias).to(output.dtype)


class RowsOfInputs(ColumnMajorPlugin):
    """Views the weight the other way round, consistently."""

    name = "rows_of_inputs"
    module_type = nn.Linear


VIOLATIONS = {
    "registration": (OtherClass, "a torch.nn.modules.linear.Linear was built"),
    "layout": (Transposed, "from_matrix(to_matrix(W))"),
    "law": (NoScaling, "the output in eval mode, of the whole layer with {}, differs by up to"),
    "gradients": (Detached, "the gradient of lora_A.default differs"),
    "several": (FirstTwo, "the output with three adapters differs"),
    "dropout": (DropsAll, "dropout=0.5 and an update of zero differs"),
    "function": (KeepsItsBias, "the output of linear, called with the weight, differs"),
    "rows": (RowsOfInputs, "each output depends on one column of the matrix of 'weight', and on several of its rows"),
    "inputs": (ReversedInputs, "no combination of the vectors that inputs() gave"),
    "merge": (LossyMerge, "the merged output differs"),
    "unload": (Leaves, "attributes differ in ['seen']"),
    "aliases": (RemembersByLayer, "the output of a layer with two names differs"),
    "keys": (DottedPart, "lora_A_first"),
    "dtype": (WideOutput, "float32 instead of"),
    "device": (OnDefaultDevice, "meta"),
    "deepcopy": (CopiesWrongly, "the output of the copy differs"),
    "pickle": (HoldsALock, "cannot pickle '_thread.lock' object"),
    "compile": (AsksForAValue, "Data-dependent branching"),
    "files": (NamedByIdentity, "has slots"),
    "stateless": (Counts, "'calls': 0"),
    "variant": (IgnoresDelta, "the mean over 300 draws is off by"),
    "biases": (NoBiases, "['bias'] is added to the output whatever the input is, and biases() names []"),
    "calls": (OnlyBatches, "shape"),
    "pure": (DrawsInTheBranch, "changes ['the random numbers of the process']"),
    "base": (ReadsTheRawWeight, "'weight'"),
    "mixed": (MixedFirstOnly, "the output of a mixed batch of rows differs"),
}
"""By check: a plugin that breaks it, and what the message says came."""

ALSO = {
    # What everything else stands on.
    "registration": set(LAYER_CHECKS) - {"layout", "rows", "inputs", "biases"},
    "law": set(LAYER_CHECKS)
    - {
        "registration",
        "layout",
        "rows",
        "inputs",
        "biases",
        "variant",
        "mixed",
        "unload",
        "keys",
        "files",
        "stateless",
    },
    # A part that is no identifier is refused as soon as the layer is to be adapted.
    "keys": set(LAYER_CHECKS) - {"layout", "function", "rows", "inputs", "biases", "mixed"},
    # Merging views the weight as a matrix, here as another one than it is.
    "layout": {"merge", "aliases", "base", "rows"},
    # Two adapters have gradients too, and so have half precision and dropout.
    "gradients": {"several", "dtype", "dropout"},
    "merge": {"aliases", "base"},
    # What was remembered of a whole batch is no output of a part of it.
    "aliases": {"calls", "pure"},
}
"""The other checks that a violation cannot but break."""


def check(plugin, *names):
    check_layer_plugin(plugin, lambda: nn.Linear(6, 6), lambda layer: torch.randn(2, 2, 6), only=names)


def test_a_good_plugin_passes_all():
    check_layer_plugin(
        Good(), lambda **options: nn.Linear(6, 5, **options), lambda layer: torch.randn(2, 6), [{}, {"bias": False}]
    )


def test_every_check_has_a_violation():
    assert set(VIOLATIONS) == set(LAYER_CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found_by_its_check_and_by_no_other(name):
    cls, _ = VIOLATIONS[name]
    plugin = cls()
    found = failing(LAYER_CHECKS, lambda each: check(plugin, each))
    assert found - (ALSO.get(name, set()) - {name}) == {name}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_error_says_what_was_expected_what_came_and_what_is_usual(name):
    cls, came = VIOLATIONS[name]
    assert_explained(name, LAYER_CHECKS, came, cls, lambda: check(cls(), name))


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_an_unknown_check_is_refused_with_a_near_one(argument):
    with pytest.raises(ConfigError, match=r"no check 'gradient'. Did you mean 'gradients'"):
        check_layer_plugin(Good(), nn.Linear, torch.randn, **{argument: ["gradient"]})


def test_a_check_can_be_left_out():
    check_layer_plugin(Leaves(), lambda: nn.Linear(3, 2), lambda layer: torch.randn(2, 3), skip=["unload"])


def test_random_numbers_of_the_process_stay():
    state = torch.get_rng_state()
    check(Good(), "law", "dropout")
    assert torch.equal(torch.get_rng_state(), state)
