"""Every pair of calls, and every triple in the slow suite, from a model with two adapters of which one acts."""

import itertools

import pytest
import torch

from tests.slow import slow_but
from tests.state.machine import NoHandleError, opened
from tests.state.rules import Step
from tests.state.spec import Spec

BEFORE = (
    Step("add", {"name": "a", "spec": Spec(("linear.proj",), init="none", bias="lora_only")}),
    Step("add", {"name": "b", "spec": Spec(("linear.proj",), r=1, init="none")}),
    Step("scramble", {"name": "a", "seed": 1}),
    Step("save", {"slot": 0, "name": "a"}),
)
"""Adapter `a` acts, and has a bias of its own; `b` has none, and can be mixed."""

CALLS = {
    "add": Step("add", {"name": "c", "spec": Spec(("linear.proj",), init="pissa")}),
    "load": Step("load", {"slot": 0, "name": "d"}),
    "swap a": Step("swap", {"slot": 0, "name": "a"}),
    "swap b": Step("swap", {"slot": 0, "name": "b"}),
    "combine": Step("combine", {"adapters": ("a", "b"), "weights": (1.0, -0.5), "name": "e"}),
    "save": Step("save", {"slot": 1, "name": "b"}),
    "set a": Step("set", {"names": ("a",)}),
    "set b": Step("set", {"names": ("b",)}),
    "set both": Step("set", {"names": ("b", "a")}),
    "set unknown": Step("set", {"names": ("z",)}),
    "set still": Step("set", {"names": ("a",), "trainable": False}),
    "delete a": Step("delete", {"name": "a"}),
    "delete b": Step("delete", {"name": "b"}),
    "merge": Step("merge", {"names": None}),
    "merge a": Step("merge", {"names": ("a",)}),
    "unmerge": Step("unmerge"),
    "unload": Step("unload"),
    "merge and unload": Step("merge_and_unload"),
    "disable": Step("disable"),
    "mixed": Step("mixed", {"rows": ("b", None, "b")}),
    "close": Step("close"),
    "train": Step("mode", {"training": True}),
    "training step": Step("train_step"),
    "forward": Step("forward"),
    "backward": Step("backward"),
    "other base": Step("load_base", {"seed": 1}),
    "own state dict": Step("load_own"),
    "copy": Step("copy", {"way": "deepcopy", "keep": "copy"}),
    "look": Step("look", {"spec": Spec(("linear.proj",))}),
}


def carry_out(*names):
    """Carries out calls; compares after the last.

    What the calls before it leave is compared where they are the last.
    """
    try:
        with opened(("linear",), torch.float64, 0) as machine:
            for step in BEFORE:
                machine.do(step, compare=False)
            for name in names:
                machine.do(CALLS[name], compare=name is names[-1])
    except NoHandleError:
        assert "copy" in names  # of a model without adapters, to which no handle exists


@pytest.mark.parametrize("first", slow_but(CALLS, [*CALLS][::3]))
def test_every_pair(first):
    carry_out(first)
    for second in CALLS:
        carry_out(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("first", CALLS)
def test_every_triple(first):
    for rest in itertools.product(CALLS, repeat=2):
        carry_out(first, *rest)
