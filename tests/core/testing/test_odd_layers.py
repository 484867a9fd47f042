"""The layer kit on layers that take and give their tensors in other ways than one by one."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins import RowMajorPlugin, Slot
from lora_plugins.testing import CheckError, check_layer_plugin


@dataclass
class Answer:
    logits: Tensor
    width: int


class Odd(nn.Module):
    """y = x Wᵀ, of a dictionary and in an object."""

    def __init__(self, answer=Answer, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=dtype))
        self.answer = answer

    def forward(self, batch):
        return self.answer(logits=F.linear(batch["x"], self.weight), width=5)


class OddPlugin(RowMajorPlugin):
    name = "odd"
    module_type = Odd

    def biases(self, layer):
        return []


class WrongPlugin(OddPlugin):
    """Computes something else where it has a branch."""

    branch_types = (Odd,)
    branch_use = "always"

    def branch(self, layer, base, terms, batch):
        return Answer(F.linear(batch["x"], base["weight"]), 5)


class SlotsOfOneName(OddPlugin):
    def slots(self, layer):
        return [Slot("weight"), Slot("weight")]


def check(plugin, only=None, **options):
    check_layer_plugin(plugin, Odd, lambda layer: ({"x": torch.randn(3, 5)},), [options], only=only)


@pytest.mark.parametrize("answer", [Answer, dict], ids=["dataclass", "dictionary"])
def test_a_layer_of_a_dictionary_passes(answer):
    check(OddPlugin(), answer=answer)


def test_what_a_dataclass_holds_is_compared():
    with pytest.raises(CheckError, match="the output in eval mode"):
        check(WrongPlugin(), only=["law"])


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        (OddPlugin(), {"answer": SimpleNamespace}, "the layer gives a SimpleNamespace, and the kit looks for tensors"),
        (OddPlugin(), {"dtype": torch.cfloat}, r"the layer has the complex parameters \['weight'\]"),
        (SlotsOfOneName(), {}, r"slots\(\) gives 'weight' and 'weight' the part ''"),
    ],
    ids=["no tensors", "complex", "one part"],
)
def test_what_cannot_be_checked_is_told_first(plugin, options, message):
    with pytest.raises(CheckError, match=message) as caught:
        check(plugin, **options)
    assert caught.value.check == "registration"
