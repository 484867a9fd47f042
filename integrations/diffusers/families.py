"""The supported families of pipelines, and which of their layers are adapted if a config names none.

The layers are those that the training scripts of diffusers adapt, without those whose output is not used: they would
have no gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_plugins import ConfigError
from lora_plugins.errors import near

_PROJECTIONS = r"to_q|to_k|to_v|to_out\.0"
_JOINT = rf"{_PROJECTIONS}|add_k_proj|add_v_proj|to_add_out"
_CLIP = r"q_proj|k_proj|v_proj|out_proj"
_CONVOLUTIONS = r"conv|conv1|conv2|conv_shortcut|conv_in|conv_out"
_T5 = r"SelfAttention\.[qkvo]"


@dataclass(frozen=True)
class Family:
    """An architecture of text-to-image pipelines.

    Attributes:
        name: Its usual name.
        pipelines: The classes of diffusers that are of it.
        denoiser: The part that removes noise.
        denoiser_class: The class of diffusers that this part is of.
        layers: By word, a regular expression for the layers of that kind, over full names in the parts.
        text_layers: By text encoder that can be trained, one for its attention projections. `{last}` stands for the
            number of its last block.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    denoiser_class: str
    layers: Mapping[str, str]
    text_layers: Mapping[str, str]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that can be trained."""
        return tuple(self.text_layers)


_UNET: Mapping[str, str] = {
    "attention": rf"unet\..*\.({_PROJECTIONS})",
    "feed_forward": r"unet\..*\.ff\.net\.(0\.proj|2)",
    "convolutions": rf"unet\.(.*\.)?({_CONVOLUTIONS})",
}
_WHOLE_CLIP = rf"text_encoder\..*\.({_CLIP})"
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "Stable Diffusion",
            ("StableDiffusionPipeline",),
            "unet",
            "UNet2DConditionModel",
            _UNET,
            {"text_encoder": _WHOLE_CLIP},
        ),
        Family(
            "Stable Diffusion XL",
            ("StableDiffusionXLPipeline",),
            "unet",
            "UNet2DConditionModel",
            _UNET,
            {  # of the first encoder, the last block but one is what is used
                "text_encoder": rf"text_encoder\..*layers\.(?!{{last}}\.)\d+\..*({_CLIP})",
                "text_encoder_2": rf"text_encoder_2\..*\.({_CLIP})",
            },
        ),
        Family(
            "Stable Diffusion 3",
            ("StableDiffusion3Pipeline",),
            "transformer",
            "SD3Transformer2DModel",
            # `add_q_proj` of the last block has no use.
            {
                "attention": rf"transformer\..*\.attn2?\.({_JOINT})|transformer\.transformer_blocks\."
                r"(?!{last}\.)\d+\.attn\.add_q_proj",
                "feed_forward": r"transformer\..*\.ff\.net\.(0\.proj|2)",
                "convolutions": r"transformer\.pos_embed\.proj",
            },
            {
                "text_encoder": _WHOLE_CLIP,
                "text_encoder_2": rf"text_encoder_2\..*\.({_CLIP})",
            },
        ),
        Family(
            "Flux",
            ("FluxPipeline",),
            "transformer",
            "FluxTransformer2DModel",
            {
                "attention": rf"transformer\..*\.attn\.({_JOINT}|add_q_proj)",
                "feed_forward": r"transformer\..*\.(ff\.net\.(0\.proj|2)|proj_mlp)",
            },
            {"text_encoder": _WHOLE_CLIP},
        ),
        Family(
            "PixArt",
            ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
            "transformer",
            "PixArtTransformer2DModel",
            {
                "attention": rf"transformer\..*\.attn[12]\.({_PROJECTIONS})",
                "feed_forward": r"transformer\..*\.ff\.net\.(0\.proj|2)",
                "convolutions": r"transformer\.pos_embed\.proj",
            },
            {"text_encoder": rf"text_encoder\..*\.{_T5}"},
        ),
    )
}
"""By name, the families that are served."""

LAYERS = ("attention", "feed_forward", "convolutions")
"""Words for kinds of layers."""


def family_of(pipe: Any) -> Family:
    """Returns the family of a pipeline.

    Raises:
        ConfigError: If it is of another kind, with the classes that are served.
    """
    name = pipe if isinstance(pipe, str) else type(pipe).__name__
    for family in FAMILIES.values():
        if name in family.pipelines:
            return family
    served = [each for family in FAMILIES.values() for each in family.pipelines]
    raise ConfigError(f"Pipelines of the kind {name} are not served. {near(name, served)}")


def denoising_family(parts: nn.ModuleDict) -> Family | None:
    """Returns a family whose denoiser is of the class of a pipeline's, such as one that inpaints; None without one."""
    for family in FAMILIES.values():
        if family.denoiser in parts and type(parts[family.denoiser]).__name__ == family.denoiser_class:
            return family
    return None


def default_targets(
    family: Family, parts: nn.ModuleDict, layers: Sequence[str] = ("attention",), *, text_encoder: bool = False
) -> str:
    """Returns a regular expression for `target_modules` that matches the layers worth adapting.

    Args:
        family: The family of the pipeline.
        parts: Its parts.
        layers: Words for kinds of layers of the denoiser, of `LAYERS`.
        text_encoder: Whether attention projections of the text encoders are among them.

    Raises:
        ConfigError: For another word, or one that the denoiser has no layers of.
    """
    if not layers:
        raise ConfigError(f"No kind of layers is named; give some of {', '.join(LAYERS)}.")
    for word in layers:
        if word not in family.layers:
            raise ConfigError(f"{family.name} has no layers of the kind {word!r}. {near(word, family.layers)}")
    chosen = [family.layers[word].replace("{last}", str(_last_block(parts[family.denoiser]))) for word in layers]
    if text_encoder:
        chosen += [
            expression.replace("{last}", str(_last_block(parts[name])))
            for name, expression in family.text_layers.items()
            if name in parts
        ]
    return "|".join(chosen)


def _last_block(part: nn.Module) -> int:
    """Returns the number of the last block in the list of blocks, which is the list with most of the parameters."""
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return len(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[None])) - 1
