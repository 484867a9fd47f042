"""Adapters of kohya's scripts and of LyCORIS, which the WebUI reads: names without dots, an alpha for each layer.

`lora_unet_down_blocks_0_..._to_q.lora_down.weight` is A of the layer whose name has dots where the underscores are.
The model tells which underscores are dots, by its own names and the original ones. LoCon's third factor, a small
convolution between two of size 1 (Yeh et al., arXiv 2309.14859), is multiplied into A.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, listing, near
from lora_plugins.formats.changes import ENDINGS, Beside, changes_and_values, take_beside
from lora_plugins.formats.components import (
    OTHER_TRANSFORMERS,
    class_names,
    part_of,
    part_told,
    paths_read,
    with_conditioner,
)
from lora_plugins.formats.layer_tensors import check_factors, magnitude_of
from lora_plugins.formats.original_names import Place, is_of_transformer, original_places, places_without_dots, put
from lora_plugins.formats.pipelines import PipelineFormat, refuse_keys, refuse_repeated, without_rslora
from lora_plugins.formats.portable import PortableAdapter, PortableLayer, commonest
from lora_plugins.formats.tensor_file import read_shapes, read_tensors, write_tensors
from lora_plugins.inplace import base_class_of, full_name, submodule
from lora_plugins.utils import common_type, single_at_least

PREFIXES: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te4_": "text_encoder_4",
    "lora_transformer_": "transformer",
    "lycoris_": "unet",
    "lora_prior_unet_": "unet",
    "lora_prior_te_": "text_encoder",
}
"""What keys start with, and which part of a pipeline it means."""

_KNOWN: Mapping[str, str] = {
    "UNet2DConditionModel": "lora_unet_",
    "ChromaTransformer2DModel": "lora_transformer_",
    "ErnieImageTransformer2DModel": "lora_unet_",
    "FluxTransformer2DModel": "lora_transformer_",
    "HiDreamImageTransformer2DModel": "lora_unet_",
    "HunyuanVideoFramepackTransformer3DModel": "lora_unet_",
    "Kandinsky5Transformer3DModel": "lora_unet_",
    "PixArtTransformer2DModel": "lora_transformer_",
    "QwenImageTransformer2DModel": "lora_unet_",
    "SD3Transformer2DModel": "lora_transformer_",
    "ZImageTransformer2DModel": "lora_unet_",
}
"""The denoisers of diffusers whose names there others know in this format, and with what in front.

OneTrainer writes `lora_transformer_` before names of diffusers. Scripts write `lora_unet_` for every denoiser, before
the original names, which those of diffusers are for some.
"""

_FACTORS: Mapping[str, str] = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "scale",
    "lora_magnitude_vector": "magnitude",
    "reshape_weight": "shape",
    **{ending.removeprefix("."): kind for ending, kind in ENDINGS.items() if ending != ".scale"},
}
"""What follows the name of a layer, and which tensor of it that is; `scale` is a number to the WebUI, for alpha / r."""

_UNCONVERTED: Mapping[str, str] = {
    "_lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    ".lora_magnitude_vector": "lora_magnitude_vector",  # for the dots in front of it
}
"""Endings that scripts of diffusers (`--output_kohya_format`) leave as they are, behind a name with dots, and ours.

These are the denoiser's where a text encoder was trained as well, and the norms of DoRA.
"""


class KohyaFormat(PipelineFormat):
    """A `.safetensors` file of kohya's scripts or of LyCORIS' LoCon.

    Options: `component`, as the format of diffusers has it.
    """

    name = "kohya"
    full_names = False
    options: ClassVar[Mapping[str, Any]] = {"component": None}

    def recognizes(self, path: Path) -> bool:
        """Whether a file has a key behind one of the usual prefixes."""
        return path.is_file() and any(_split(key) is not None for key in read_shapes(path))

    def load(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Reads a file; see `PortableFormat`."""
        tensors, metadata = read_tensors(path)
        found = _sorted(tensors)
        beside = take_beside(found)
        layers = {key: _layer(key, factors) for key, factors in found.items()}
        details = {key: metadata[key] for key in ("ss_base_model_version", "ss_network_module") if key in metadata}
        if model is None:
            changes, values = changes_and_values(beside)
            return PortableAdapter(layers, values, details=details, changes=changes)
        names_of_parts = _names_of_parts({**layers, **beside}, model, options["component"])
        paths = paths_read(names_of_parts, model, options["component"])
        placed: dict[str, PortableLayer] = {}
        placed_beside: dict[str, Beside] = {}
        for part, path_in_model in paths.items():
            within = submodule(model, path_in_model)
            places = _placed(names_of_parts[part], within)
            own, besides = put(layers, places, within), put(beside, places, within)
            placed |= {full_name(path_in_model, name): layer for name, layer in own.items()}
            placed_beside |= {full_name(path_in_model, name): each for name, each in besides.items()}
        changes, values = changes_and_values(placed_beside)
        return PortableAdapter(placed, values, details=details, changes=changes)

    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes a file; see `PortableFormat`."""
        if path.suffix != ".safetensors":
            raise AdapterFileError(f"{path}: this format is a file, whose name ends in .safetensors.")
        places = part_of(adapter.layers, model, options["component"])
        parts = {part for part, _ in places.values()}
        prefix_of = _prefixes_written(parts, model)
        if lacking := parts - prefix_of.keys():
            raise AdapterFileError(
                f"{listing(sorted(lacking))} has no name in this format; there is {listing(prefix_of)}."
            )
        if (unknown := _unknown_denoiser(parts, model)) is not None:
            warnings.warn(
                f"{path}: the layers of {unknown} have the names of diffusers, which others do not know in this "
                "format. lora_plugins reads it; for diffusers, write format='diffusers', for ComfyUI 'comfyui'.",
                stacklevel=2,
            )
        layers = without_rslora(adapter)
        names = {full: prefix_of[part] + _known_name(part, name) for full, (part, name) in places.items()}
        tensors = _keys(layers, {full: name.replace(".", "_") for full, name in names.items()})
        said = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(commonest(layer.r for layer in layers.values())),
            "ss_network_alpha": str(commonest(layer.alpha for layer in layers.values())),
        }
        write_tensors(path, tensors, said)
        return path


def _prefixes_written(parts: Collection[str], model: nn.Module | None) -> dict[str, str]:
    """Returns what the names of each part start with; `lora_te_` is the text encoder of a pipeline that has one."""
    prefix_of = {part: prefix for prefix, part in reversed([*PREFIXES.items()])}
    children = {} if model is None else dict(model.named_children())
    if any(name.startswith("text_encoder_") for name in (*parts, *children)):
        prefix_of["text_encoder"] = "lora_te1_"
    if "text_encoder_2" in children and "T5" in base_class_of(children["text_encoder_2"]).__name__:
        prefix_of["text_encoder_2"] = "lora_te3_"  # as kohya's scripts call it for Flux too
    if model is not None and (known := _known_prefix(_denoiser_in(model))) is not None:
        prefix_of["transformer"] = known
    return prefix_of


def _unknown_denoiser(parts: Collection[str], model: nn.Module | None) -> str | None:
    """Returns the class of a denoiser whose names in diffusers mean nothing elsewhere; None if there is none."""
    if model is None or all(part.startswith("text_encoder") for part in parts):
        return None
    denoiser = _denoiser_in(model)
    cls = base_class_of(denoiser)
    return cls.__name__ if cls.__module__.startswith("diffusers.") and _known_prefix(denoiser) is None else None


def _denoiser_in(model: nn.Module) -> nn.Module:
    """Returns the denoiser among the parts of a pipeline, or the model itself."""
    children = dict(model.named_children())
    return next((children[name] for name in ("unet", "transformer", "transformer_2") if name in children), model)


def _known_prefix(denoiser: nn.Module) -> str | None:
    """Returns what others expect in front of the names that a denoiser has in diffusers; None for unknown ones."""
    return next((_KNOWN[name] for name in class_names(denoiser) if name in _KNOWN), None)


def _known_name(part: str, name: str) -> str:
    """Returns the name by which other programs know a layer: transformers 5 has dropped `text_model` from CLIP's."""
    return f"text_model.{name}" if part.startswith("text_encoder") and name.startswith("encoder.layers.") else name


def _keys(layers: Mapping[str, PortableLayer], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the tensors of layers by their keys in a file.

    Raises:
        AdapterFileError: If two layers have one name in the file.
    """
    tensors: dict[str, Tensor] = {}
    for full, key in names.items():
        if f"{key}.alpha" in tensors:
            raise AdapterFileError(f"{full!r} and another layer have one name in this format: {key!r}.")
        tensors |= {f"{key}.{ending}": tensor for ending, tensor in _tensors_of(layers[full]).items()}
    return tensors


def _tensors_of(layer: PortableLayer) -> dict[str, Tensor]:
    """Returns the tensors of a layer by the endings of their keys."""
    tensors = {"lora_down.weight": layer.A, "lora_up.weight": layer.B, "alpha": number(layer.alpha)}
    if layer.magnitude is not None:
        ones = [1] * (layer.B.dim() - 1)
        tensors["dora_scale"] = layer.magnitude.reshape(-1, *ones)
    return tensors


def number(value: float) -> Tensor:
    """Returns a number as a tensor, in single precision where that has it."""
    single = torch.tensor(value, dtype=torch.float32, device="cpu")
    return single if float(single) == value else single.to(torch.float64).fill_(value)


def _split(key: str) -> tuple[str, str] | None:
    """Returns the name of a layer, its prefix included, and what follows; None without a usual prefix."""
    if not key.startswith(tuple(PREFIXES)):
        return None
    end = next((end for end in _UNCONVERTED if key.endswith(end)), None)
    if end is not None:
        return key.removesuffix(end).replace(".", "_"), _UNCONVERTED[end]
    name, _, rest = key.partition(".")
    return name, rest


def _sorted(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each layer.

    Raises:
        AdapterFileError: If a key has no place, naming the method that it is of, or the place of another one.
    """
    split = {key: _split(key) or (key, "") for key in tensors}
    refuse_keys([key for key, (_, rest) in split.items() if rest not in _FACTORS])
    placed = {key: (name, _FACTORS[rest]) for key, (name, rest) in split.items()}
    refuse_repeated(placed)
    found: dict[str, dict[str, Tensor]] = {}
    for key, (name, kind) in placed.items():
        found.setdefault(name, {})[kind] = tensors[key]
    return found


def _layer(name: str, factors: Mapping[str, Tensor]) -> PortableLayer:
    check_factors(name, factors)
    A, B = factors["A"], factors["B"]
    alpha = float(factors["alpha"]) if "alpha" in factors else float(len(A))
    if "mid" in factors:
        wide = single_at_least(common_type(A.dtype, factors["mid"].dtype))  # a product in half precision is rounded
        A = torch.einsum("ba...,ai->bi...", factors["mid"].to(wide), A.flatten(1).to(wide))
    magnitude = magnitude_of(name, factors["scale"], len(B)) if "scale" in factors else factors.get("magnitude")
    return PortableLayer(A, B, alpha, magnitude)


def _names_of_parts(keys: Iterable[str], model: nn.Module, asked: str | None) -> dict[str, dict[str, str]]:
    """Returns by part of a pipeline the layers of a file, each with its name behind the prefix."""
    prefixes = {key: next(prefix for prefix in PREFIXES if key.startswith(prefix)) for key in keys}
    names = {key: key.removeprefix(prefix) for key, prefix in prefixes.items()}
    parts = dict(PREFIXES)
    children = dict(model.named_children())
    told = (asked or part_told(model) or "").startswith("transformer")
    beside = "unet" not in children and not children.keys().isdisjoint(("transformer", *OTHER_TRANSFORMERS))
    if told or beside or any(map(is_of_transformer, names.values())):
        parts |= {prefix: "transformer" for prefix, part in PREFIXES.items() if part == "unet"}
    found: dict[str, dict[str, str]] = {}
    for key, prefix in prefixes.items():
        part, name = with_conditioner(parts[prefix], names[key], model)
        found.setdefault(part, {})[key] = name
    return found


def _placed(names: Mapping[str, str], model: nn.Module) -> dict[str, Place]:
    """Returns where each layer of a file is in a part of a pipeline, from the names without their prefix.

    Raises:
        AdapterFileError: If a layer has no place, or more than one.
    """
    known = places_without_dots(model, original_places(model))
    # LyCORIS 2.2 has an underscore behind each name, where it adapts a model by itself, and VideoX-Fun one in front.
    found = {
        key: known.get(name) or known.get(name.removesuffix("_")) or known.get(name.removeprefix("_"), [])
        for key, name in names.items()
    }
    lacking = [key for key, places in found.items() if not places]
    if lacking:
        raise AdapterFileError(
            f"{len(lacking)} of {len(found)} layers of the adapter are not in this model: {listing(lacking)}. "
            f"{near(names[lacking[0]], known)}"
        )
    double = [key for key, places in found.items() if len(places) > 1]
    if double:
        names_of_it = [name for place in found[double[0]] for name in place.names]
        raise AdapterFileError(f"{double[0]!r} can be {listing(names_of_it)} in this model.")
    return {key: places[0] for key, places in found.items()}
