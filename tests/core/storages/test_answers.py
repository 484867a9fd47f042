"""What a storage of others returns is told by its name where nothing could be computed with it."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, PluginError, StoragePlugin, build_registry, hookimpl


class Whole(StoragePlugin):
    """Rounds to whole numbers."""

    name = "whole"

    def store(self, weight, options):
        return {"codes": weight.round().to(torch.int8)}

    def restore(self, tensors, shape, options):
        return tensors["codes"].float().view(shape)


class AList(Whole):
    def store(self, weight, options):
        return [weight.to(torch.int8)]


class Nothing(Whole):
    def store(self, weight, options):
        return {}


class Dotted(Whole):
    def store(self, weight, options):
        return {"my.codes": weight.to(torch.int8)}


class OneRow(Whole):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options)[:1]


class NoTensor(Whole):
    def restore(self, tensors, shape, options):
        return None


class NoNumbers(Whole):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options) / 0 * 0


class Taken(Whole):
    def store(self, weight, options):
        return {"forward": weight.to(torch.int8)}


class Fails(Whole):
    def store(self, weight, options):
        raise ValueError("no license server")


def stored_by(plugin):
    class Hooks:
        @hookimpl
        def lora_plugins_register_storages(self, registrar):
            registrar.add(plugin)

    model = nn.Sequential(nn.Linear(5, 4))
    config = LoraConfig(r=2, quantize="whole", quantize_options={"min_size": 0})
    return LoraModel(model, config, registry=build_registry([("mine", Hooks())]))


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (AList(), r"store\(\) of the storage 'whole' gives <class 'list'>"),
        (Nothing(), r"store\(\) of the storage 'whole' gives no tensor"),
        (Dotted(), r"store\(\) of the storage 'whole' gives names that no attributes have: \['my.codes'\]"),
        (OneRow(), r"restore\(\) of the storage 'whole' gives \(1, 5\) for \(4, 5\)"),
        (NoTensor(), r"restore\(\) of the storage 'whole' gives None for \(4, 5\)"),
        (NoNumbers(), r"restore\(\) of whole with {} gives '0.weight' values that are not dense and finite"),
        (Taken(), r"store\(\) of the storage 'whole' gives the name 'forward'.*as in forward_values"),
    ],
    ids=["a list", "nothing", "a dotted name", "one row", "no tensor", "no numbers", "a name that is taken"],
)
def test_wrong_answers_are_told(plugin, message):
    with pytest.raises(PluginError, match=message):
        stored_by(plugin).model(torch.randn(2, 5))


def test_an_error_of_a_storage_is_told_with_its_place():
    with pytest.raises(ValueError, match="no license server") as caught:
        stored_by(Fails())
    assert caught.value.__notes__ == ["It was raised in the storage 'whole', for '0.weight'."]
