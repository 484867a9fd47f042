"""Adapters that are loaded onto a part of their model, or onto a model that holds theirs."""

import json

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()


formats = pytest.mark.parametrize("format", ["lora_plugins", "peft"])


@formats
@pytest.mark.parametrize("targets", [["0"], ["1.0", "1.1"], "all"], ids=["numbers", "paths", "all"])
def test_the_part_is_named(tmp_path, targets, format):
    part = network()
    LoraModel(part, LoraConfig(r=1, target_modules=targets)).save_adapter(tmp_path, format=format)
    whole = Task()
    with pytest.raises(
        AdapterFileError, match=r"a part of this model, 'net'.*load_adapter\(model\.get_submodule\('net'\), path\)"
    ):
        LoraModel.load_adapter(whole, tmp_path)
    LoraModel.load_adapter(whole.net, tmp_path)


@formats
@pytest.mark.parametrize("targets", [["0"], ["net.1.0", "net.1.1"], "all"], ids=["numbers", "paths", "all"])
@pytest.mark.parametrize("wrapped", [nn.DataParallel, nn.Sequential], ids=["parallel", "nested"])
def test_the_model_around_is_named(tmp_path, targets, wrapped, format):
    whole = wrapped(Task())
    LoraModel(whole, LoraConfig(r=1, target_modules=targets)).save_adapter(tmp_path, format=format)
    (name,) = (name for name, _ in whole.named_children())
    with pytest.raises(AdapterFileError, match=rf"holds this one as '{name}\.net'.* Load it onto that model"):
        LoraModel.load_adapter(network(), tmp_path)


def test_layers_of_peft_that_its_words_mean_here_too_are_no_missing_ones(tmp_path):
    """The layers of the model are not said to lack an A and B, as they would be where the file had only some."""
    LoraModel(network(), LoraConfig(r=1, target_modules=["1.0"])).save_adapter(tmp_path, format="peft")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["1.0"]}))
    with pytest.raises(AdapterFileError, match="a part of this model, 'net'"):
        LoraModel.load_adapter(Task(), tmp_path)


def test_a_part_that_holds_some_of_the_layers_only_is_not_named(tmp_path):
    LoraModel(network(), LoraConfig(r=1, target_modules="all")).save_adapter(tmp_path)
    with pytest.raises(AdapterFileError) as refused:
        LoraModel.load_adapter(nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4))}), tmp_path)
    assert "a part of this model" not in str(refused.value)
