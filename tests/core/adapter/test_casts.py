"""A model that is cast between any two calls is what the same calls make of the model in float64."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lora_plugins import LoraConfig, LoraModel
from tests.slow import thinned

TYPES = {
    "down": (torch.float64, torch.float32, 1e-5),
    "up": (torch.float32, torch.float64, 1e-5),
    "half": (torch.float32, torch.bfloat16, 0.1),
}
"""Type before the cast, after it, and what rounding in the narrower one may make of an output."""


class Net(nn.Module):
    def __init__(self, computed=False):
        super().__init__()
        self.a = nn.Linear(5, 6)
        if computed:
            parametrizations.weight_norm(self.a)
        self.norm = nn.BatchNorm1d(6)
        self.b = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()))


KINDS = {
    "float": (False, {"modules_to_save": ["head"], "norm": "track"}),
    "computed": (True, {"bias": "lora_only"}),
    "stored": (False, {"quantize": "nf4", "quantize_options": {"min_size": 0}}),
    "dora": (False, {"variant": "dora"}),
}

CALLS = {
    "first": lambda lora, blocks: lora.set_adapter("x"),
    "second": lambda lora, blocks: lora.set_adapter("y"),
    "merge": lambda lora, blocks: lora.merge_adapter(max_error=10),
    "unmerge": lambda lora, blocks: lora.unmerge_adapter(),
    "combine": lambda lora, blocks: (lora.add_weighted_adapter(["x", "y"], [0.5, 2.0], "z"), lora.set_adapter("z")),
    "finish": lambda lora, blocks: lora.merge_and_unload(max_error=10, dequantize=True),
    "unload": lambda lora, blocks: lora.unload(dequantize=False),
    "disable": lambda lora, blocks: blocks.enter_context(lora.disable_adapter()),
    "end": lambda lora, blocks: blocks.close(),
}

SEQUENCES = [
    "cast", "second cast", "cast second", "cast second first", "cast merge", "merge cast", "merge cast unmerge",
    "merge cast unmerge second", "cast merge unmerge", "cast combine", "second cast combine", "cast finish",
    "merge cast finish", "merge cast unload", "cast unload", "disable cast end", "disable cast end second",
    "cast disable end second", "cast disable end combine",
]  # fmt: skip


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["head"]}], ids=["bias", "head"])
def test_what_is_saved_in_a_block_after_a_cast_is_what_is_saved_after_the_block(fields):
    """The adapter's own values were not in place when the model was cast."""
    lora = LoraModel(Net(), LoraConfig(r=2, target_modules=["a"], **fields))
    with lora.disable_adapter():
        lora.model.to(torch.bfloat16)
        inside = lora.pack("default").tensors
    outside = lora.pack("default").tensors
    assert {key: tensor.dtype for key, tensor in inside.items()} == {key: t.dtype for key, t in outside.items()}
    assert all(torch.equal(inside[key], tensor) for key, tensor in outside.items())


def test_a_base_that_is_loaded_after_a_cast_keeps_all_its_digits():
    model = adapted("float", torch.bfloat16).float()
    base = {name: tensor + (1e-4 if tensor.is_floating_point() else 0) for name, tensor in Net().state_dict().items()}
    model.load_state_dict(base)
    with LoraModel(model).disable_adapter():
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in base.items() if tensor.is_floating_point())


def adapted(kind, dtype):
    computed, fields = KINDS[kind]
    torch.manual_seed(0)
    model = Net(computed).to(dtype).eval()
    for r, name in enumerate("xy", 2):
        LoraModel(model, LoraConfig(r=r, target_modules=["a", "b"], init="gaussian", **fields), name)
        LoraModel(model).set_adapter(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape).to(dtype))
    LoraModel(model).set_adapter("x")
    return model


def called(model, sequence, dtype):
    lora, blocks = LoraModel(model), ExitStack()
    for name in sequence.split():
        if name == "cast":
            model.to(dtype)
        else:
            CALLS[name](lora, blocks)
    return model


@thinned(2, kind=[*KINDS], types=[*TYPES], sequence=SEQUENCES)
def test_a_cast_changes_nothing_but_rounding(kind, types, sequence):
    before, after, allowed = TYPES[types]
    if kind == "dora" and "combine" in sequence:
        pytest.skip("a DoRA adapter is not combined")
    model = adapted(kind, before)
    wanted = called(copy.deepcopy(model).double(), sequence, torch.float64)
    model = called(model, sequence, after)
    x = torch.randn(4, 5, dtype=torch.float64)
    found, expected = model(x.to(after)), wanted(x)
    assert found.dtype == after
    assert (found.double() - expected).norm() <= allowed * expected.norm()
