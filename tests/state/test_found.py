"""What random walks found, as short sequences that are judged again each time."""

import pytest
import torch

from tests.state.rules import Step
from tests.state.shrink import Case, replay
from tests.state.spec import Spec

LINEAR, HEAD = Spec(("linear.proj",), init="none"), Spec(("head.body",), init="none", saves=("head.head.out",))


def add(name, spec):
    return Step("add", {"name": name, "spec": spec})


def act(*names):
    return Step("set", {"names": names})


def case(*steps, blocks=("linear",), dtype=torch.float64):
    return Case(blocks, dtype, 0, steps)


A, B = add("a", LINEAR), add("b", Spec(("linear.proj",), r=1, init="none"))
TRAIN, EVAL = Step("mode", {"training": True}), Step("mode", {"training": False})
MERGE, UNLOAD, UNMERGE = Step("merge", {"names": None}), Step("unload"), Step("unmerge")
DISABLE, MIXED, CLOSE = Step("disable"), Step("mixed", {"rows": ("a", None, "b")}), Step("close")
FORWARD, BACKWARD = Step("forward"), Step("backward")
SAVE, LOAD, MOVE = (
    Step("save", {"slot": 0, "name": "a"}),
    Step("load", {"slot": 0, "name": "c"}),
    Step("move", {"slot": 0}),
)
OTHER, SAME = Step("load_base", {"seed": 1}), Step("load_base", {"seed": None})
COPY = Step("copy", {"way": "deepcopy", "keep": "copy"})
SCRAMBLE, STEP = Step("scramble", {"name": "a", "seed": 1}), Step("train_step")
HEADED = add("a", HEAD)


def combine(*adapters):
    return Step("combine", {"adapters": adapters, "weights": (1.0,) * len(adapters), "name": "c"})


def bilinear(**fields):
    return Spec(("bilinear.form",), init="none", **fields)


def tied(*sites, **fields):
    return Spec(tuple(f"tied.{site}" for site in sites), init="none", **fields)


CASES = {
    "S1-dropout": case(TRAIN, add("a", bilinear(variant="dora", dropout=1e-9)), SCRAMBLE, blocks=("bilinear",)),
    "S1-beside-plain": case(
        add("a", bilinear(variant="gated")), SCRAMBLE, add("b", bilinear()), act("b", "a"), blocks=("bilinear",)
    ),
    "S2-first": case(HEADED, blocks=("head",), dtype=torch.float16),
    "S2-second": case(add("b", Spec(("head.body",))), HEADED, act("a"), blocks=("head",), dtype=torch.bfloat16),
    "S3-fingerprint": case(A, SAVE, OTHER, SAVE, UNLOAD, LOAD),
    "S3-changed-base": case(add("a", Spec(("linear.proj",), init="pissa")), SAME),
    "S3-shared": case(add("a", Spec(("twice.first",), bias="all")), OTHER, blocks=("twice",)),
    "S3-head": case(HEADED, SCRAMBLE, OTHER, blocks=("head",)),
    "S4-disable-in-mixed": case(A, B, MIXED, DISABLE, CLOSE),
    "S4-mixed-in-mixed": case(A, B, MIXED, Step("mixed", {"rows": ("b", "b", None)}), CLOSE),
    "S4-set": case(A, B, MIXED, act("b")),
    "S4-merge": case(A, B, MIXED, MERGE),
    "S4-delete": case(A, B, MIXED, Step("delete", {"name": "b"})),
    "S4-delete-in-disable": case(A, B, DISABLE, Step("delete", {"name": "a"})),
    "S4-add": case(A, DISABLE, B),
    "S4-load": case(A, SAVE, DISABLE, LOAD),
    "S4-combine": case(A, DISABLE, combine("a")),
    "S4-unload": case(A, DISABLE, UNLOAD),
    "S4-merge-and-unload": case(A, DISABLE, Step("merge_and_unload")),
    "S4-state-dict": case(A, DISABLE, Step("load_own")),
    "S4-training": case(A, B, MIXED, TRAIN),
    "S4-copy": case(A, B, MIXED, COPY),
    "S4-copy-in-disable": case(A, DISABLE, COPY),
    "S5-set": case(A, act("a", "a")),
    "S5-merge": case(A, Step("merge", {"names": ("a", "a")})),
    "S7-merge": case(A, FORWARD, MERGE, BACKWARD),
    "S7-set": case(A, B, FORWARD, act("b"), BACKWARD),
    "S7-not-trainable": case(A, FORWARD, Step("set", {"names": ("a",), "trainable": False}), BACKWARD),
    "S7-delete": case(A, B, FORWARD, Step("delete", {"name": "a"}), BACKWARD),
    "S7-disable": case(A, FORWARD, DISABLE, BACKWARD),
    "S7-merge-and-unload": case(A, FORWARD, Step("merge_and_unload"), BACKWARD),
    "S7-unload": case(HEADED, FORWARD, UNLOAD, BACKWARD, blocks=("head",)),
    "S7-unmerge": case(
        add("a", Spec(("conv2d.conv",), init="none")), MERGE, FORWARD, UNMERGE, BACKWARD, blocks=("conv2d",)
    ),
    "S7-add": case(FORWARD, A, BACKWARD),
    "S7-add-of-weights": case(Step("forward", {"of_input": False}), A, BACKWARD),
    "S7-inside": case(HEADED, DISABLE, FORWARD, CLOSE, BACKWARD, blocks=("head",)),
    "S7-around": case(HEADED, SCRAMBLE, FORWARD, DISABLE, CLOSE, BACKWARD, blocks=("head",)),
    "S7-head-inside": case(HEADED, SCRAMBLE, FORWARD, DISABLE, BACKWARD, blocks=("head",)),
    "S7-mixed": case(
        add("a", Spec(("linear.proj",), saves=("conv2d.conv",))),
        SCRAMBLE,
        FORWARD,
        Step("mixed", {"rows": (None,) * 3}),
        BACKWARD,
        blocks=("conv2d", "linear"),
    ),
    "S7-mixed-recurrent": case(
        add("a", Spec(("linear.proj",), saves=("recurrent.lstm",))),
        Step("mixed", {"rows": (None, "a", None)}),
        blocks=("linear", "recurrent"),
    ),
    "S12-combine": case(
        add("a", Spec(("attention.mha", "attention.mha.out_proj"), parts={"attention.mha": ("q",)})),
        combine("a"),
        blocks=("attention",),
    ),
    "S13-parts": case(
        add("a", Spec(("fused.qkv",))),
        add("b", Spec(("fused.qkv",), parts={"fused.qkv": ("q",)})),
        combine("a", "b"),
        blocks=("fused",),
    ),
    "N1-weight-not-trained": case(add("a", Spec(("linear.proj",), saves=("tied.b",))), blocks=("linear", "tied")),
    "N1-adapted-and-saved": case(add("a", tied("a", saves=("tied.b",))), blocks=("tied",)),
    "N2-bias-of-tied-layer": case(add("a", tied("a", "b", bias="lora_only")), blocks=("tied",)),
    "N3-one-for-both": case(add("a", tied("a")), add("b", tied("a", "b")), combine("a", "b"), blocks=("tied",)),
    "N4-thawed": case(
        add("a", Spec(("norms.inner",), norm="track")),
        add("b", Spec(("norms.inner",))),
        TRAIN,
        Step("delete", {"name": "a"}),
        blocks=("norms",),
    ),
    "N5-separate-parts": case(
        add("a", Spec(("cross.mha",), parts={"cross.mha": ("k",)})), combine("a"), blocks=("cross",)
    ),
    "N6-save-in-mixed": case(HEADED, SCRAMBLE, Step("mixed", {"rows": (None,) * 3}), SAVE, blocks=("head",)),
    "N7-dropout-beside-variant": case(
        add("a", bilinear(variant="dora")),
        add("b", bilinear(dropout=1e-9)),
        act("a", "b"),
        TRAIN,
        blocks=("bilinear",),
    ),
    "N7-dropout-beside-tie": case(
        add("a", Spec(("tokens.out",), dropout=1e-9)),
        add("b", Spec(("tokens.embed", "tokens.out"))),
        act("a", "b"),
        TRAIN,
        blocks=("tokens",),
    ),
    "N7-dropout-beside-tie-of-one-type": case(
        add("a", tied("b", dropout=1e-9)), add("b", tied("a", "b")), act("a", "b"), TRAIN, blocks=("tied",)
    ),
    "N8-changed-base-laid-out": case(
        add("a", Spec(("conv2d.conv",))),
        Step("lay_out", {"channels_last": True}),
        Step("merge_and_unload"),
        add("a", Spec(("conv2d.conv",), init="olora")),
        blocks=("conv2d",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees(name):
    found = replay(CASES[name])
    assert found is None, found
