"""The keys of diffusers' files over the years: which tensor of which layer of a pipeline each of them is."""

import re
from collections.abc import Collection, Mapping

from lora_plugins.formats.changes import ENDINGS as BESIDE
from lora_plugins.formats.components import COMPONENTS, ORIGINAL
from lora_plugins.formats.peft_keys import PREFIX
from lora_plugins.utils import plain_name

_ENDINGS: Mapping[str, str] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_A": "A",  # of parameters, as loralib has them and the authors of Mochi
    ".lora_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".magnitude": "magnitude",
    ".dora_scale": "scale",
    ".lora_B.bias": "bias_B",
    ".alpha": "alpha",
    ".reshape_weight": "shape",
    **BESIDE,
}
"""The endings of keys over the years, and which tensor of a layer each is."""

ALONE = ""
"""The part of keys that name none: what `save_lora_adapter` of a denoiser writes, and authors of models do."""

_STARTS: Mapping[str, str] = {
    "conditional_transformer.": f"{ORIGINAL}.",
    "prior.": f"{ORIGINAL}.",
    "diffusion_model.transformer_1.": "transformer.",
    "diffusion_model.transformer_2.": "transformer_2.",
    "lora_te.": "text_encoder.",
    "lora_te1.": "text_encoder.",
    "lora_te2.": "text_encoder_2.",
    "text_embedding_projection.": "connectors.",
}
"""How keys name parts in other ways.

These are the denoisers of Ideogram 4 and of Stable Cascade, both of Wan 2.2 in one file of ai-toolkit, its text
encoders, and what is behind those of LTX 2.
"""

_OF_COMFY = re.compile(r"^text_encoders\.(\w+)\.transformer\.")
_ENCODERS: Mapping[str, str] = {
    "byt5_small": "text_encoder_2",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
    "llama": "text_encoder_4",
}
"""The text encoders of ComfyUI that are not the first one of a pipeline, as CLIP, Qwen and Gemma are."""

_FLAT = ("lora_", "lycoris_")
"""What such keys do not start with: those are names without dots, of another format."""

_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.([^.]+)(?=\.(?:weight|bias)$)")
"""Where keys of a model that PEFT has wrapped name the adapter, as some scripts save them."""

_PROJECTIONS: Mapping[str, str] = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
"""The projections that the oldest keys name by the processor of an attention, and their names in it."""

_TEXT_PROJECTIONS: Mapping[str, str] = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Those that the oldest keys of text encoders name by the attention alone."""

CLIP_PROJECTIONS = tuple(f".{name}" for name in _TEXT_PROJECTIONS.values())
"""What the names of the attention projections of CLIP end with."""

_OLDEST = re.compile(r"(.+\.(?:processor|self_attn))\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
"""The oldest keys, of a denoiser and of a text encoder."""

_PROCESSORS: Mapping[str, str] = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}
"""How XLabs names the layers of a block of Flux, by processors that adapt them, and their original names."""

_OF_PROCESSOR = re.compile(rf"((?:double|single)_blocks\.\d+)\.processor\.({'|'.join(_PROCESSORS)})\.(down|up)\.weight")
_DIRECTIONS: Mapping[str, str] = {"down": "A", "up": "B"}


def own_key(key: str) -> str:
    """Returns PEFT's key of a layer of a text encoder as diffusers writes it."""
    return key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def adapter_name(key: str) -> str | None:
    """Returns the name of PEFT's adapter in a key, as in `lora_A.default.weight`; None if it has none."""
    found = _ADAPTER.search(key)
    return None if found is None else found[2]


def is_of_pipeline(keys: Collection[str]) -> bool:
    """Whether keys are of parts of a pipeline, and none begins as all do that PEFT writes itself.

    Trainers such as diffusion-pipe write them beside PEFT's config, under the name of PEFT's file.
    """
    if any(key.startswith(PREFIX) for key in keys):
        return False
    return any((place := placed_key(key)) is not None and place[0] != ALONE for key in keys)


def placed_key(key: str, children: Collection[str] = ()) -> tuple[str, str, str] | None:
    """Returns the part, the layer and the kind of tensor of a key; None if it is no key of diffusers.

    Keys of layers in children of the model that are no parts of a pipeline name none: a `prior` may be its own.
    """
    key = _ADAPTER.sub(r"\1", plain_name(key).removeprefix(PREFIX))
    is_own = key.partition(".")[0] in children
    if not is_own:
        start = next((start for start in _STARTS if key.startswith(start)), "")
        key = _STARTS.get(start, "") + key.removeprefix(start)
        key = _OF_COMFY.sub(lambda found: f"{_ENCODERS.get(found[1], 'text_encoder')}.", key, count=1)
    part, _, rest = key.partition(".")
    if is_own or part not in (*COMPONENTS, ORIGINAL):
        if key.startswith(_FLAT) and not is_own:
            return None
        part, rest = ALONE, key
    of_processor = _OF_PROCESSOR.fullmatch(rest)
    if of_processor:
        block, own, direction = of_processor.groups()
        return part, f"{block}.{_PROCESSORS[own]}", _DIRECTIONS[direction]
    oldest = _OLDEST.fullmatch(rest)
    if oldest:
        attention, own, direction = oldest.groups()
        names = _PROJECTIONS if attention.endswith(".processor") else _TEXT_PROJECTIONS
        return part, f"{attention.removesuffix('.processor')}.{names[own]}", _DIRECTIONS[direction]
    ending = next((ending for ending in _ENDINGS if rest.endswith(ending)), None)
    return (part, rest.removesuffix(ending), _ENDINGS[ending]) if ending else None
