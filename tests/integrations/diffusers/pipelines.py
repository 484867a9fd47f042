"""A tiny random pipeline of each family that is served."""

import functools
from collections.abc import Callable

import diffusers
import torch
import transformers

from lora_plugins.tasks.examples.diffusion_pretraining import build_tokenizer

WORDS = ("a", "photo", "of", "sks", "dog", "cat")


def clip_tokenizer():
    return build_tokenizer(WORDS, length=16)


def clip(projection=None, layers=2):
    size = len(clip_tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        projection_dim=projection or 16,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz▁"]
    return transformers.T5Tokenizer([(piece, -float(number)) for number, piece in enumerate(pieces)], extra_ids=0)


def t5(width=16):
    config = transformers.T5Config(
        vocab_size=48, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def vae(channels=4, **more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **more,
    )


def unet(**more):
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **more,
    )


def ddim(**more):
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **more,
    )


def stable_diffusion(**scheduler):
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=16),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl():
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=16),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
            use_linear_projection=True,
            transformer_layers_per_block=1,
        ),
        scheduler=ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3():
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(projection=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(width=32),
        tokenizer_3=t5_tokenizer(),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux():
    return diffusers.FluxPipeline(
        vae=vae(shift_factor=0.1, scaling_factor=0.3),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def pixart():
    return diffusers.PixArtAlphaPipeline(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        scheduler=ddim(),
    )


PIPELINES: dict[str, Callable] = {
    "Stable Diffusion": stable_diffusion,
    "Stable Diffusion 2": functools.partial(stable_diffusion, prediction_type="v_prediction"),
    "Stable Diffusion XL": stable_diffusion_xl,
    "Stable Diffusion 3": stable_diffusion_3,
    "Flux": flux,
    "PixArt": pixart,
}
"""By family; 2.x of Stable Diffusion is of the same classes, and predicts the velocity."""


def build(name):
    """A pipeline with random weights, the same ones each time, none of them zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe = PIPELINES[name]()
        with torch.no_grad():
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()  # T5 has dropout
                    for parameter in part.parameters():
                        parameter.add_(0.02 * torch.randn_like(parameter))
    pipe.set_progress_bar_config(disable=True)
    return pipe
