"""Layers of any class are adapted, or refused by name while planning; never is a model left half adapted."""

import abc
import copy
import pickle

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, TargetError


class Abstract(abc.ABC):  # noqa: B024
    """As the mixins of quantization libraries are: no attributes, and before the layer's own class."""

    __slots__ = ()


class WithAbstract(Abstract, nn.Linear):
    pass


class WithSlots(nn.Linear):
    __slots__ = ("more",)


class NormWithAbstract(Abstract, nn.BatchNorm1d):
    pass


class NoSubclasses(type):
    def __new__(cls, name, bases, namespace):
        if any(isinstance(base, NoSubclasses) for base in bases):
            raise TypeError("this class is final")
        return super().__new__(cls, name, bases, namespace)


class Final(nn.Linear, metaclass=NoSubclasses):
    pass


@pytest.mark.parametrize("cls", [WithAbstract, WithSlots], ids=lambda cls: cls.__name__)
def test_a_class_of_another_layout_is_adapted(cls):
    model = nn.Sequential(nn.Linear(4, 4), cls(4, 2), NormWithAbstract(2)).eval()
    before = model(torch.ones(1, 4))
    lora = LoraModel(model, LoraConfig(r=2, init="none"))
    adapted = model(torch.ones(1, 4))
    assert not torch.equal(adapted, before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(torch.ones(1, 4)), adapted)
    assert "lora[default" in repr(model[1])
    assert not model.train()[2].training
    lora.unload()
    assert [type(layer) for layer in model] == [nn.Linear, cls, NormWithAbstract]
    assert model[2].training


def test_a_class_that_cannot_be_extended_is_refused_while_planning():
    model = nn.Sequential(nn.Linear(4, 4), Final(4, 2))
    with pytest.raises(TargetError, match="'1': its class Final cannot be extended: this class is final"):
        LoraModel(model, LoraConfig(r=2))
    assert [type(layer) for layer in model] == [nn.Linear, Final]
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("stored", [{}, {"quantize": "int8", "quantize_options": {"min_size": 0}}], ids=str)
def test_what_the_class_of_a_layer_makes_anew_is_untouched(stored):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    lora = LoraModel(model, LoraConfig(r=2, **stored))
    with lora.disable_adapter():
        resting = type(model[0])(4, 3)
    linear, norm = type(model[0])(4, out_features=3), type(model[1])(4)
    assert (type(linear), type(resting), type(norm)) == (nn.Linear, nn.Linear, nn.BatchNorm1d)
    assert set(linear.state_dict()) == set(resting.state_dict()) == {"weight", "bias"}
    assert norm.eval().train().training
