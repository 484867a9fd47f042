"""Gradient checkpointing: the same gradients, and fewer activations kept."""

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.tasks import ImageClassificationTask, ModelConfig
from lora_plugins.tasks.models import enable_checkpointing

from ..conftest import HALF, tiny_vit

HF = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "timm": tiny_vit,
    "transformers": lambda: ModelConfig("transformers", "vit", 3, "none", HF | {"intermediate_size": 48}, HALF, HALF),
}


def task(make, **fields):
    torch.manual_seed(0)
    return ImageClassificationTask(make(), **fields).train()


def gradients_and_kept(task):
    """The gradients of one step, and how many elements it keeps outside of parameters and inputs."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.raw_logits(torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).square().sum()
    loss.backward()
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}, len(kept)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_gradients_are_the_same_and_less_is_kept(make, quantize):
    found = []
    for checkpointing in (False, True):
        one = task(make, gradient_checkpointing=checkpointing)
        options = {"min_size": 0} if quantize else {}
        LoraModel(one.network, LoraConfig(r=2, init="gaussian", quantize=quantize, quantize_options=options))
        found.append(gradients_and_kept(one))
    (plain, all_kept), (again, few_kept) = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
    assert few_kept < all_kept / 2


def test_a_network_that_cannot_is_refused_by_name():
    with pytest.raises(ConfigError, match="gradient_checkpointing: Linear cannot compute its blocks again"):
        enable_checkpointing(nn.Linear(2, 2))
