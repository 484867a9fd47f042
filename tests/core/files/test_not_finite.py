"""Files whose tensors have values that are not finite, in every format."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, MergeError

OPTIONS = {"kohya": {"component": "unet"}, "diffusers": {"component": "unet"}}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def saved(path, change, format="lora_plugins", **fields):
    """Saves an adapter after a change to its model."""
    model = network()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], **fields))
    with torch.no_grad():
        change(model)
    path = path / "adapter.safetensors" if format in OPTIONS else path
    return lora.save_adapter(path, format=format, format_options=OPTIONS.get(format))


@pytest.mark.parametrize("format", ["lora_plugins", "peft", "kohya", "diffusers"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_file_and_tensor_are_named_and_a_merge_is_refused(tmp_path, format, value, factor):
    def change(model):
        getattr(model[0], f"lora_{factor}")["default"][1, 0] = value

    path = saved(tmp_path, change, format)
    model = network()
    with pytest.warns(UserWarning, match=rf"{re.escape(str(path))}: .*'lora/0/lora_{factor}'.*not finite"):
        lora = LoraModel.load_adapter(model, path, format_options=OPTIONS.get(format))
    with pytest.raises(MergeError, match=r"'0\.weight'.*not finite"):
        lora.merge_and_unload()


def test_a_head_is_named(tmp_path):
    path = saved(tmp_path, lambda model: model[2].bias.fill_(math.nan), modules_to_save=["2"])
    with pytest.warns(UserWarning, match=r"'value/2\.bias'"):
        LoraModel.load_adapter(network(), path)


def test_a_swap_says_it(tmp_path):
    path = saved(tmp_path, lambda model: model[0].lora_B["default"].fill_(math.nan))
    lora = LoraModel(network(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="'lora/0/lora_B'.*not finite"):
        lora.swap_adapter("default", path)


def test_a_buffer_may_be_infinite(tmp_path):
    """Masks of attention are."""
    path = saved(tmp_path, lambda model: model[1].running_mean.fill_(-math.inf), modules_to_save=["1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel.load_adapter(network(), path)
