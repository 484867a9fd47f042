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


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (AList(), r"store\(\) of the storage 'whole' gives <class 'list'>"),
        (Nothing(), r"store\(\) of the storage 'whole' gives no tensor"),
        (Dotted(), r"store\(\) of the storage 'whole' gives names that no attributes have: \['my.codes'\]"),
        (OneRow(), r"restore\(\) of the storage 'whole' gives \(1, 5\) for \(4, 5\)"),
    ],
    ids=["a list", "nothing", "a dotted name", "one row"],
)
def test_wrong_answers_are_told(plugin, message):
    class Hooks:
        @hookimpl
        def lora_plugins_register_storages(self, registrar):
            registrar.add(plugin)

    model = nn.Sequential(nn.Linear(5, 4))
    config = LoraConfig(r=2, quantize="whole", quantize_options={"min_size": 0})
    with pytest.raises(PluginError, match=message):
        LoraModel(model, config, registry=build_registry([("mine", Hooks())])).model(torch.randn(2, 5))
