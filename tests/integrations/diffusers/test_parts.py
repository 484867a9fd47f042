"""Parts that a LoraPipeline does not adapt, or that are not there."""

import re

import diffusers
import pytest
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from lora_plugins.integrations.diffusers import LoraPipeline
from tests.integrations.diffusers.pipelines import build, clip


def stable_cascade():
    """The prior of Stable Cascade, whose denoiser is called like that, except for what it draws with."""
    prior = diffusers.PriorTransformer(num_layers=1, num_attention_heads=2, attention_head_dim=8, embedding_dim=16)
    return diffusers.StableCascadePriorPipeline(
        tokenizer=None, text_encoder=clip(projection=16), prior=prior, scheduler=None
    )


ALONE = r"Other parts ('prior') are adapted by themselves: LoraModel(pipe.prior, config)."


@pytest.mark.parametrize("call", [LoraPipeline, LoraPipeline.plan], ids=["adapting", "planning"])
@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (None, "has no part that is known as a denoiser. LoraPipeline adapts its 'text_encoder'"),
        (["to_q"], "'to_q' matches no module"),
        (r"prior\..*\.to_[qv]", "matches no module"),
    ],
    ids=["no layers", "a list", "an expression"],
)
def test_a_denoiser_that_is_no_part_is_told(call, layers, said):
    pipe = stable_cascade()
    with pytest.raises(ConfigError, match=rf"(?s){re.escape(said)}.*{re.escape(ALONE)}"):
        call(pipe, LoraConfig(r=2, target_modules=layers))
    LoraModel(pipe.prior, LoraConfig(r=2, target_modules=["to_q"]))
    assert len(LoraPipeline(pipe, LoraConfig(r=2, target_modules=["q_proj"])).plans["default"].layers) == 2


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["to_qq"]}, {"target_modules": ["to_q"], "exclude_modules": ["to_qq"]}],
    ids=["they lack them too", "these are found"],
)
def test_other_parts_are_not_told_of_where(fields):
    with pytest.raises(TargetError, match="Did you mean") as raised:
        LoraPipeline(build("Stable Diffusion"), LoraConfig(r=2, **fields))
    assert "Other parts" not in str(raised.value)


def test_parts_that_are_not_loaded_are_told():
    pipe = build("Stable Diffusion")
    pipe.register_modules(unet=None, text_encoder=None)
    with pytest.raises(ConfigError, match=r"'unet', 'text_encoder' of the StableDiffusionPipeline is None\. Load it"):
        LoraPipeline(pipe, LoraConfig(r=2))


def test_a_pipeline_of_other_parts_is_told():
    upsampler = diffusers.LTXLatentUpsamplePipeline(vae=None, latent_upsampler=nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"has none of the parts that are adapted: unet, .* LoraModel adapts another"):
        LoraPipeline(upsampler, LoraConfig(r=2))
