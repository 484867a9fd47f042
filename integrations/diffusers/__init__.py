"""LoRA on pipelines of diffusers: one adapter over the denoiser and the text encoders.

    lora = LoraPipeline(pipe, LoraConfig(r=8))        # the layers that are usual for its architecture
    LoraPipeline.load_adapter(pipe, "style.safetensors")  # ours, diffusers' or the WebUI's

Only `load_pipeline` imports diffusers; the rest works on a pipeline that is there.
"""

from typing import TYPE_CHECKING

from lora_plugins.lazy import lazily

if TYPE_CHECKING:
    from lora_plugins.integrations.diffusers.families import FAMILIES, LAYERS, Family, default_targets, family_of
    from lora_plugins.integrations.diffusers.loading import load_pipeline
    from lora_plugins.integrations.diffusers.lora_pipeline import LoraPipeline
    from lora_plugins.integrations.diffusers.parts import parts_of
    from lora_plugins.integrations.diffusers.sampling import Sampling, in_eval_mode, sample
    from lora_plugins.integrations.diffusers.sheets import contact_sheet

__all__ = [
    "FAMILIES",
    "LAYERS",
    "Family",
    "LoraPipeline",
    "Sampling",
    "contact_sheet",
    "default_targets",
    "family_of",
    "in_eval_mode",
    "load_pipeline",
    "parts_of",
    "sample",
]

_MODULES = {
    **dict.fromkeys(("FAMILIES", "Family", "LAYERS", "default_targets", "family_of"), "families"),
    "load_pipeline": "loading",
    "LoraPipeline": "lora_pipeline",
    "parts_of": "parts",
    **dict.fromkeys(("Sampling", "in_eval_mode", "sample"), "sampling"),
    "contact_sheet": "sheets",
}

__getattr__, __dir__ = lazily(__name__, _MODULES, extra="diffusion")
