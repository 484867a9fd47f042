"""How each family of pipelines encodes prompts and predicts the noise in latents.

Prompts are encoded by the pipelines themselves, so that training and sampling see the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Condition = Mapping[str, Tensor]
"""What a denoiser is conditioned on; every tensor has a row for each prompt."""


@dataclass(frozen=True)
class Conditioning:
    """What a family does.

    Attributes:
        encode: Encodes prompts with a pipeline on a device.
        denoise: Takes a pipeline, noisy latents (N, C, H, W), times (N,), a condition and the sizes of a batch (N, 6),
            and returns what the denoiser predicts, a tensor (N, C, H, W).
        multiple: What height and width of latents have to be multiples of.
    """

    encode: Callable[[Any, list[str], torch.device], Condition]
    denoise: Callable[[Any, Tensor, Tensor, Condition, Tensor], Any]
    multiple: Callable[[Any], int]


def _unet_multiple(pipe: Any) -> int:
    return int(2 ** (len(pipe.unet.config.block_out_channels) - 1))


def _patch(pipe: Any) -> int:
    return int(pipe.transformer.config.patch_size)


def _packed(pipe: Any) -> int:
    return 2


def _encode_sd(pipe: Any, prompts: list[str], device: torch.device) -> Condition:
    return {"words": pipe.encode_prompt(prompts, device, 1, False)[0]}


def _denoise_sd(pipe: Any, noisy: Tensor, times: Tensor, condition: Condition, sizes: Tensor) -> Any:
    return pipe.unet(noisy, times, encoder_hidden_states=condition["words"], return_dict=False)[0]


def _encode_sdxl(pipe: Any, prompts: list[str], device: torch.device) -> Condition:
    words, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"words": words, "pooled": pooled}


def _denoise_sdxl(pipe: Any, noisy: Tensor, times: Tensor, condition: Condition, sizes: Tensor) -> Any:
    told = {"text_embeds": condition["pooled"], "time_ids": sizes.to(noisy)}
    words = condition["words"]
    return pipe.unet(noisy, times, encoder_hidden_states=words, added_cond_kwargs=told, return_dict=False)[0]


def _encode_sd3(pipe: Any, prompts: list[str], device: torch.device) -> Condition:
    words, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    return {"words": words, "pooled": pooled}


def _denoise_sd3(pipe: Any, noisy: Tensor, times: Tensor, condition: Condition, sizes: Tensor) -> Any:
    return pipe.transformer(
        hidden_states=noisy,
        timestep=times,
        encoder_hidden_states=condition["words"],
        pooled_projections=condition["pooled"],
        return_dict=False,
    )[0]


def _encode_flux(pipe: Any, prompts: list[str], device: torch.device) -> Condition:
    words, pooled, _ = pipe.encode_prompt(prompts, None, device=device)
    return {"words": words, "pooled": pooled}


def _denoise_flux(pipe: Any, noisy: Tensor, times: Tensor, condition: Condition, sizes: Tensor) -> Any:
    count, channels, height, width = noisy.shape
    guided = pipe.transformer.config.guidance_embeds
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
        timestep=times / 1000,
        guidance=torch.ones(count, device=noisy.device) if guided else None,
        pooled_projections=condition["pooled"],
        encoder_hidden_states=condition["words"],
        txt_ids=torch.zeros(condition["words"].shape[1], 3).to(noisy),
        img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(predicted, height, width, 1)


def _encode_pixart(pipe: Any, prompts: list[str], device: torch.device) -> Condition:
    words, mask, _, _ = pipe.encode_prompt(prompts, False, device=device, clean_caption=False)
    return {"words": words, "mask": mask}


def _denoise_pixart(pipe: Any, noisy: Tensor, times: Tensor, condition: Condition, sizes: Tensor) -> Any:
    target = sizes[:, 4:].to(noisy)
    # The largest models were trained with the size of the picture as a condition.
    told = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
    predicted = pipe.transformer(
        noisy,
        encoder_hidden_states=condition["words"],
        encoder_attention_mask=condition["mask"],
        timestep=times,
        added_cond_kwargs=told if pipe.transformer.config.sample_size == 128 else dict.fromkeys(told),
        return_dict=False,
    )[0]
    return predicted[:, : noisy.shape[1]]  # the other half is a variance, which is not trained


CONDITIONING: Mapping[str, Conditioning] = {
    "Stable Diffusion": Conditioning(_encode_sd, _denoise_sd, _unet_multiple),
    "Stable Diffusion XL": Conditioning(_encode_sdxl, _denoise_sdxl, _unet_multiple),
    "Stable Diffusion 3": Conditioning(_encode_sd3, _denoise_sd3, _patch),
    "Flux": Conditioning(_encode_flux, _denoise_flux, _packed),
    "PixArt": Conditioning(_encode_pixart, _denoise_pixart, _patch),
}
"""By the name of a family."""
