"""What a storage of others returns is told by its name where nothing could be computed with it."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, PluginError, StoragePlugin
from tests.core.registries import registry_of


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


class Sparse(Whole):
    def store(self, weight, options):
        return {"codes": super().store(weight, options)["codes"].to_sparse()}


class OneOfTheRows(Whole):
    def rows(self, tensors, index, shape, options):
        return self.restore(tensors, shape, options)[0]


class Expanded(Whole):
    """Has a zero for each row, all of which are one, and two tensors in one memory."""

    def store(self, weight, options):
        zeros = torch.zeros(1, dtype=torch.int8).expand(len(weight))
        scales = torch.arange(2 * len(weight), device=weight.device).float()
        return {**super().store(weight, options), "zeros": zeros, "even": scales[::2], "odd": scales[1::2]}


class Fails(Whole):
    def store(self, weight, options):
        raise ValueError("no license server")


def stored_by(plugin, layer=None):
    model = nn.Sequential(layer or nn.Linear(5, 4))
    config = LoraConfig(r=2, quantize="whole", quantize_options={"min_size": 0})
    return LoraModel(model, config, registry=registry_of(plugin))


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (AList(), r"store\(\) of the storage 'whole' gives <class 'list'>"),
        (Nothing(), r"store\(\) of the storage 'whole' gives no tensor"),
        (Dotted(), r"store\(\) of the storage 'whole' gives names that no attributes have: \['my.codes'\]"),
        (OneRow(), r"restore\(\) of the storage 'whole' gives \(1, 5\) for \(4, 5\)"),
        (NoTensor(), r"restore\(\) of the storage 'whole' gives None for \(4, 5\)"),
        (NoNumbers(), r"restore\(\) of whole with {} gives '0.weight' values that are not dense and finite"),
        (Sparse(), r"store\(\) of the storage 'whole' gives \['codes'\], which no file can hold.* indices and values"),
        (Taken(), r"store\(\) of the storage 'whole' gives the name 'forward'.*as in forward_values"),
    ],
    ids=["a list", "nothing", "a dotted name", "one row", "no tensor", "no numbers", "sparse", "a name that is taken"],
)
def test_wrong_answers_are_told(plugin, message):
    with pytest.raises(PluginError, match=message):
        stored_by(plugin).model(torch.randn(2, 5))


def test_rows_of_another_shape_are_not_broadcast():
    lora = stored_by(OneOfTheRows(), nn.Embedding(6, 5))
    with pytest.raises(PluginError, match=r"rows\(\) of the storage 'whole' gives \(5,\) for \(2, 3, 5\)"):
        lora.model(torch.arange(6).view(2, 3))


def test_what_is_stored_has_memory_of_its_own():
    model = stored_by(Expanded()).model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value + 1 if "stored" in key else value for key, value in state.items()})
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key] + 1 if "stored" in key else state[key])


def test_an_error_of_a_storage_is_told_with_its_place():
    with pytest.raises(ValueError, match="no license server") as caught:
        stored_by(Fails())
    assert caught.value.__notes__ == ["It was raised in the storage 'whole', for '0.weight'."]
