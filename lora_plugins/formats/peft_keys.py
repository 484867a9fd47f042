"""The keys of PEFT's tensor files: which tensor of which layer each of them is."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_plugins.errors import AdapterFileError
from lora_plugins.formats.portable import PortableLayer
from lora_plugins.utils import plain_name

PREFIX = "base_model.model."
"""What every key starts with."""

WRAPPER = "base_layer"
"""The component by which PEFT's wrapper of a layer names the layer itself."""

_SAVED = "modules_to_save"
"""The component by which PEFT's wrapper of a head names the one that was trained, in keys that are there twice."""

_UNTRAINED = "original_module"
"""The component by which it names the head of before, of which PEFT saves the biases too."""

_WRAPPERS = (WRAPPER, _SAVED, _UNTRAINED)

_PROJECTION = ".out_proj."

_FACTORS: Mapping[str, str] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias_B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
"""The endings of keys, and which tensor of a layer each is."""

_NAMED = re.compile(r"(\.lora_(?:(?:embedding_)?[AB]|magnitude_vector))\.default(?=\.weight$|\.bias$|$)")
"""An ending with the name of the adapter, as in a state dict of the model, which PEFT reads as well."""

_LINEAR = ("lora_A.weight", "lora_B.weight")

_REFUSED: Mapping[str, str] = {
    ".trainable_tokens_delta": "trained tokens of an embedding (trainable_token_indices), which have no place here",
}
"""The endings of keys that have no place here."""

_OF_TRAINING = (".lora_velora_embed", ".lora_monteclora_sampler.")
"""What is in keys of tensors that nothing but training uses: of VeLoRA and MonteCLoRA."""


@dataclass(frozen=True)
class PeftTensors:
    """The tensors of a file, sorted.

    Args:
        factors: By name of a layer, its tensors: `A`, `B`, and `magnitude` where it has one.
        values: Heads, biases and statistics by full name.
        copies: Copies of tensors of the untouched model, by full name.
        in_attention: The layers that are output projections of an `nn.MultiheadAttention` which is adapted as well.
        layer_types: The types of layers that keys tell, by name.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    in_attention: set[str] = field(default_factory=set)
    layer_types: dict[str, str] = field(default_factory=dict)


def sorted_tensors(tensors: Mapping[str, Tensor], modules: Collection[str]) -> PeftTensors:
    """Sorts the tensors of a file.

    Modules of the model, none without one, can have the names of PEFT's wrappers: `base_layer` is one of DLA.

    Raises:
        AdapterFileError: If a key is none of PEFT's, or has no place here. All are listed.
    """
    found, unused = PeftTensors(), _unused(tensors, modules)
    used = [(key, tensor) for key, tensor in tensors.items() if key.rpartition(_PROJECTION)[0] not in unused]
    wrong = [text for key, tensor in used if (text := _place(found, key, tensor, modules))]
    wrong += [f"{name!r}: it is no key of PEFT's LoRA" for name in found.values if _is_unknown(found, name, modules)]
    if wrong:
        raise AdapterFileError("The adapter has keys without a place:\n  " + "\n  ".join(wrong[:20]))
    for name in [f"{layer}.weight" for layer in found.factors]:
        if name in found.values:  # PEFT saves the weight of an adapted embedding beside its A and B
            found.copies[name] = found.values.pop(name)
    return found


def _unused(keys: Iterable[str], modules: Collection[str]) -> set[str]:
    """Returns the paths of attentions with keys of an unused second wrapper of their output projection.

    PEFT adds one beside its wrapper of the attention where `out_proj` is targeted too, and computes nothing with it.
    """
    parts = {key.partition(f".{WRAPPER}{_PROJECTION}lora_")[::2] for key in keys}
    paths = {path for path, rest in parts if rest}
    return {path for path in paths if f"{path.removeprefix(PREFIX)}.{WRAPPER}" not in modules}


def _place(found: PeftTensors, key: str, tensor: Tensor, modules: Collection[str]) -> str:
    """Puts a tensor in its place; returns why it has none, or nothing."""
    reason = next((reason for ending, reason in _REFUSED.items() if key.endswith(ending)), None)
    if reason or not key.startswith(PREFIX):
        return f"{key!r}: {reason or f'it does not start with {PREFIX!r}, as what save_pretrained of PEFT writes'}"
    if any(word in key for word in _OF_TRAINING):
        return ""
    # torch.compile puts a component into names, which PEFT keeps, and then cannot find.
    name, wrappers = _unwrapped(plain_name(key.removeprefix(PREFIX)), modules)
    name = _NAMED.sub(r"\1", name)
    ending = next((ending for ending in _FACTORS if name.endswith(ending)), None)
    if ending is None:
        return _put(found.copies if _UNTRAINED in wrappers else found.values, name, tensor, key)
    layer = name.removesuffix(ending)
    if WRAPPER in wrappers and f".{WRAPPER}.lora_" in key:
        return (
            f"{key!r}: two parameters of {layer!r} are adapted (target_parameters), and a layer has one A and B here. "
            "Merge the adapter in PEFT, and use the merged model"
        )
    if WRAPPER in wrappers and layer.rpartition(".")[2] == "out_proj":
        found.in_attention.add(layer)
        found.layer_types[layer.removesuffix(".out_proj")] = "multihead_attention"
    if "lora_embedding_" in ending:
        found.layer_types[layer] = "embedding"
    return _put(found.factors.setdefault(layer, {}), _FACTORS[ending], tensor, key)


def _unwrapped(name: str, modules: Collection[str]) -> tuple[str, list[str]]:
    """Returns a name without PEFT's wrappers and the adapter's name after one, and what was left out."""
    kept: list[str] = []
    left_out: list[str] = []
    parts = name.split(".")
    for at, part in enumerate(parts):
        is_own = ".".join([*kept, part]) in modules
        is_adapter = bool(modules) and left_out[-1:] == [_SAVED] == parts[at - 1 : at] and at + 1 < len(parts)
        (left_out if not is_own and (part in _WRAPPERS or is_adapter) else kept).append(part)
    return ".".join(kept), left_out


def _is_unknown(found: PeftTensors, name: str, modules: Collection[str]) -> bool:
    """Whether a value belongs to the adapter of a layer and is of an unknown kind."""
    layer, lora, kind = name.rpartition(".lora_")
    own = f"{layer}.lora_{kind.partition('.')[0]}"
    return bool(lora) and (layer in found.factors or (own.endswith((".lora_A", ".lora_B")) and own not in modules))


def _put(place: dict[str, Tensor], name: str, tensor: Tensor, key: str) -> str:
    if name in place and not torch.equal(place[name], tensor):
        return f"{key!r}: another key has another value of this tensor"
    place[name] = tensor
    return ""


def layer_keys(layers: Mapping[str, PortableLayer], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Returns the tensors of adapted layers by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        path, _, own = name.rpartition(".")
        place = prefix + (f"{path}.{WRAPPER}.{own}" if layer.in_attention else name)
        A, B = ("lora_embedding_A", "lora_embedding_B") if layer.layer_type == "embedding" else _LINEAR
        tensors |= {f"{place}.{A}": layer.A, f"{place}.{B}": layer.B}
        if layer.magnitude is not None:
            kernel = layer.A.dim() - 2
            shape = (1, -1, *(1 for _ in range(kernel))) if kernel else (-1,)
            tensors[f"{place}.lora_magnitude_vector"] = layer.magnitude.view(shape)
    return tensors


def value_keys(values: Mapping[str, Tensor], layers: Mapping[str, PortableLayer]) -> dict[str, Tensor]:
    """Returns heads, biases and statistics by PEFT's keys. There, adapted layers have wrappers around them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in values.items():
        path, _, own = name.rpartition(".")
        layer = layers.get(path)
        if layer is not None and layer.in_attention:
            attention, _, projection = path.rpartition(".")
            path = f"{attention}.{WRAPPER}.{projection}"
        place = f"{path}.{WRAPPER}.{own}" if layer is not None else name
        tensors[PREFIX + place] = tensor
    return tensors
