"""What formats of others are given of a model that is not what it was when its adapter was added."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from tests.core.formats.peft_cases import moved


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))).double()


def grown(model):
    """A model with one more layer, which the words of a config mean as well."""
    torch.manual_seed(1)
    model.append(nn.Sequential(nn.Linear(4, 4).requires_grad_(False)).double())
    return model


WORDS = {
    "layers": LoraConfig(r=2, target_modules="all"),
    "biases": LoraConfig(r=2, target_modules="all", bias="all"),
}


@pytest.mark.parametrize(
    ("words", "format"),
    [("layers", "peft"), ("layers", "diffusers"), ("layers", "kohya"), ("biases", "peft")],
)
def test_layers_that_the_model_got_later_are_not_of_the_adapter(words, format, tmp_path):
    """Such as those of an IP-Adapter, beside those of the UNet that it is loaded into."""
    lora = LoraModel(build(), WORDS[words])
    moved(lora.model)
    expected = lora.model(torch.eye(4).double())
    grown(lora.model)
    options = {} if format == "peft" else {"component": "unet"}
    path = tmp_path / ("adapter" if format == "peft" else "adapter.safetensors")
    lora.save_adapter(path, format=format, format_options=options)
    again = LoraModel.load_adapter(build(), path, format_options=options)
    assert {layer.name for layer in again.plans["default"].layers} == {"0", "1.0"}
    torch.testing.assert_close(again.model(torch.eye(4).double()), expected, rtol=0, atol=1e-12)


def test_nor_are_modules_that_a_word_means_as_well(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "a": nn.ModuleDict({"head": nn.Linear(4, 2)})})
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    moved(model)
    model["b"] = nn.ModuleDict({"head": nn.Linear(4, 2).requires_grad_(False)})
    lora.save_adapter(tmp_path, format="peft")
    del model["b"]
    trained = model["a"]["head"].weight.clone()
    lora.unload()
    assert not torch.equal(model["a"]["head"].weight, trained)
    LoraModel.load_adapter(model, tmp_path)
    assert torch.equal(model["a"]["head"].weight, trained)
