"""What a module consists of is put back, whatever was done to it."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils import prune

from lora_plugins.inplace import Contents


def test_what_torch_takes_away_is_put_back():
    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    before, names, x = Contents([layer], [layer._forward_pre_hooks]), list(layer.state_dict()), torch.randn(4, 3)
    expected = layer(x)
    prune.remove(layer, "weight")
    assert list(layer.state_dict()) != names
    before.put_back()
    assert list(layer.state_dict()) == names
    assert torch.equal(layer(x), expected)


def test_what_torch_adds_is_taken_away():
    layer = nn.Linear(3, 2)
    before, names, x = Contents([layer], [layer._forward_pre_hooks]), list(layer.state_dict()), torch.randn(4, 3)
    expected = layer(x)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert list(layer.state_dict()) != names
    before.put_back()
    assert list(layer.state_dict()) == names
    assert torch.equal(layer(x), expected)


class OfAModule(OrderedDict):
    """Parameters as DeepSpeed holds them, in a dictionary that cannot be copied."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_parameters_in_a_dictionary_that_cannot_be_copied():
    layer = nn.Linear(3, 2)
    parameters, layer._parameters = layer._parameters, OfAModule(layer)
    layer._parameters.update(parameters)
    before = Contents([layer], [])
    del layer.bias
    before.put_back()
    assert isinstance(layer._parameters, OfAModule)
    assert dict(layer._parameters) == parameters
