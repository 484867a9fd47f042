"""Small parts of diffusion pipelines, and what adapters change in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_plugins import LoraModel
from tests.core.formats.peft_cases import moved

TOLERANCE = 1e-9
"""Of float64 outputs, as a share of the largest."""


def unet():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def text_encoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config)


def transformer():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        out_channels=4,
    )


def _unet_output(model):
    return model(torch.randn(1, 4, 8, 8).double(), 3, torch.randn(1, 5, 16).double()).sample


def _text_output(model):
    return model(torch.randint(2, 50, (1, 6))).last_hidden_state


def _transformer_output(model):
    latents, words, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 16)
    output = model(latents.double(), words.double(), pooled.double(), torch.tensor([3.0]).double())
    return output.sample


@dataclass(frozen=True)
class Part:
    """One part of a pipeline."""

    name: str
    make: Callable[[], Any]
    output: Callable[[Any], torch.Tensor]
    targets: list[str]

    def build(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = self.make().double().eval()
            with torch.no_grad():  # SD3's last layers start at zero, where no adapter is seen
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def run(self, model):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(6)
            return self.output(model)

    def difference(self, first, second):
        expected = self.run(second)
        return float((self.run(first) - expected).abs().max() / expected.abs().max())

    def read_exactly(self, path, expected):
        """Checks that the part, with the adapter of a file, computes what another model does."""
        model = self.build()
        LoraModel.load_adapter(model, path)
        assert self.difference(model, expected) <= TOLERANCE


UNET = Part("unet", unet, _unet_output, ["to_q", "to_v", "to_out.0", "conv1", "conv_in"])
TEXT = Part("text_encoder", text_encoder, _text_output, ["q_proj", "v_proj", "fc1"])
DIT = Part("transformer", transformer, _transformer_output, ["to_q", "to_k", "to_v", "to_out.0"])
PARTS = [UNET, TEXT, DIT]
parts = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)


def with_peft(part, **fields):
    """The part with an adapter that PEFT put into it, as the training scripts of diffusers do."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": part.targets, **fields})
    model = part.build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    return moved(model)
