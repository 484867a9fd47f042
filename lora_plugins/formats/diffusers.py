"""Adapters of diffusers: a `.safetensors` file with the parts of a pipeline, and PEFT's configs as metadata."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_plugins.config import rank_divisor
from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.changes import ENDINGS as BESIDE
from lora_plugins.formats.changes import Beside, changes_and_values, take_beside
from lora_plugins.formats.components import COMPONENTS, ORIGINAL, denoiser_of, part_of, paths_read, with_conditioner
from lora_plugins.formats.diffusers_keys import (
    ALONE,
    CLIP_PROJECTIONS,
    adapter_name,
    is_of_pipeline,
    own_key,
    placed_key,
)
from lora_plugins.formats.layer_tensors import check_factors, magnitude_of
from lora_plugins.formats.minimax_h3 import alpha_of_all, refuse_alternating_rows
from lora_plugins.formats.original_names import by_own_names
from lora_plugins.formats.peft import CONFIG
from lora_plugins.formats.peft import TENSORS as TENSORS_OF_PEFT
from lora_plugins.formats.peft_config import WRITTEN_FOR, PeftConfig, config_fields
from lora_plugins.formats.peft_keys import PREFIX, layer_keys
from lora_plugins.formats.peft_model import in_model, present
from lora_plugins.formats.pipelines import PipelineFormat, refuse_keys, refuse_repeated, without_rslora
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.tensor_file import parse_json, read_json, read_shapes, read_tensors, write_tensors
from lora_plugins.inplace import full_name, model_modules, submodule

TENSORS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Where the header of a file has PEFT's configs, as JSON of one level: `unet.r`, `text_encoder.lora_alpha`, ..."""

_NORMS = ".lora_magnitude_vector"
"""The ending of PEFT's keys of the norms of DoRA."""

_Part = dict[str, dict[str, Tensor]]
"""The tensors of one part of a pipeline in a file, by name of the layer."""


class DiffusersFormat(PipelineFormat):
    """What `save_lora_weights` of diffusers writes, and `save_lora_adapter` of one model: a folder or a file of it.

    A folder may have the file under the name of PEFT's, with PEFT's config beside it, as diffusion-pipe writes it.

    Options: `component`, which part of a pipeline the model is, such as `unet` or `text_encoder`; where a file has one
    part, or the class of the model tells, it need not be said. `patterns`, as PEFT's format has it.
    """

    name = "diffusers"
    file_names: ClassVar[Sequence[str]] = (TENSORS,)
    options: ClassVar[Mapping[str, Any]] = {"component": None, "patterns": None}
    first_reading: ClassVar[Mapping[str, Any]] = {"patterns": "first"}

    def recognizes(self, path: Path) -> bool:
        """Whether a file, or that of a folder, has keys of diffusers, with a part of a pipeline in front or without."""
        parts = parts_in(path)
        return bool(parts) and ORIGINAL not in parts

    def load(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Reads a file; see `PortableFormat`."""
        file = _file(path)
        tensors, metadata = read_tensors(file)
        if model is not None:
            refuse_alternating_rows(tensors, model)
        parts = _parts(tensors, model, options["component"])
        beside = {part: take_beside(found) for part, found in parts.items()}
        of_header = _configs(metadata, parts, options["patterns"])
        configs = of_header or _configs_beside(file, parts, options["patterns"])
        modules = [] if model is None else [entry.name for entry in model_modules(model)]
        for part, config in configs.items():
            config.check_expressions([*(name.removeprefix(f"{part}.") for name in modules), *parts[part]])
        alpha = alpha_of_all(metadata, tensors, model)
        alone = parts.get(ALONE, {})
        alphas_said = ALONE in configs or alpha is not None or any("alpha" in each for each in alone.values())
        if alone and not alphas_said:
            warnings.warn(
                f"{path} says no alpha, neither in keys nor as metadata: the rank of each layer is taken for it, as "
                "diffusers does. If it was trained with another, its update has another scale.",
                stacklevel=2,
            )
        layers = {
            part: {name: _layer(name, factors, configs.get(part), alpha) for name, factors in found.items()}
            for part, found in parts.items()
        }
        if model is None:
            return _adapter(layers, beside, {part: part for part in parts}, configs)
        _name_denoiser(denoiser_of(model, options["component"]), layers, beside, configs)
        paths = paths_read(layers, model, options["component"])
        for part, path_in_model in paths.items():
            within = submodule(model, path_in_model)
            # A config beside the file targets layers by the names that they had in training, as the keys may not.
            layers[part] = in_model(within, by_own_names(layers[part], within), of_header.get(part))
            beside[part] = present(within, by_own_names(beside[part], within))
        return _adapter(layers, beside, paths, configs)

    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes a file; see `PortableFormat`."""
        places = part_of(adapter.layers, model, options["component"])
        plain = without_rslora(adapter)
        tensors: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        for part in dict.fromkeys(part for part, _ in places.values()):
            layers = {name: plain[full] for full, (owner, name) in places.items() if owner == part}
            said |= {f"{part}.{key}": value for key, value in _fields(layers, adapter).items()}
            tensors |= {f"{part}.{key}": tensor for key, tensor in _keys(part, layers).items()}
        header = {"format": "pt", METADATA: json.dumps(said, indent=2, sort_keys=True)}
        write_tensors(path if path.suffix == ".safetensors" else path / TENSORS, tensors, header)
        return path


def parts_in(path: Path) -> set[str]:
    """Returns the parts of a pipeline that keys of a file, or that of a folder, are of; none if it is no such file."""
    file = _file(path)
    keys = [*read_shapes(file)] if file.is_file() else []
    if file.name == TENSORS_OF_PEFT:  # whose alphas are beside it
        keys = [key for key in keys if not key.startswith(PREFIX)]
    placed = [found for key in keys if (found := placed_key(key)) is not None]
    return {part for part, _, kind in placed if part != ALONE or kind not in ("alpha", *BESIDE.values())}


def _file(path: Path) -> Path:
    """Returns the file that is read."""
    if path.suffix == ".safetensors":
        return path
    own, of_peft = path / TENSORS, path / TENSORS_OF_PEFT
    return of_peft if not own.is_file() and is_of_pipeline(read_shapes(of_peft)) else own


def _parts(tensors: Mapping[str, Tensor], model: nn.Module | None, asked: str | None) -> dict[str, _Part]:
    """Returns the tensors of each part, of those alone that are read where one is asked for."""
    children = set() if model is None else {name for name, _ in model.named_children()} - {*COMPONENTS}
    found = {key: placed_key(key, children) for key in tensors}
    refuse_keys([key for key, place in found.items() if place is None])
    placed = {key: _with_conditioner(place, model) for key, place in found.items() if place is not None}
    if model is not None and asked is not None:
        placed = _of_read_parts(placed, model, asked)
    refuse_repeated(placed)
    _refuse_several(placed)
    parts: dict[str, _Part] = {}
    for key, (part, name, kind) in placed.items():
        parts.setdefault(part, {}).setdefault(name, {})[kind] = tensors[key]
    return parts


def _of_read_parts(
    placed: Mapping[str, tuple[str, str, str]], model: nn.Module, asked: str
) -> dict[str, tuple[str, str, str]]:
    """Returns the places of those keys that are of the part which is asked for, whatever the others hold."""
    denoiser = denoiser_of(model, asked)
    owners = {key: denoiser if part in (ORIGINAL, ALONE) else part for key, (part, _, _) in placed.items()}
    names: dict[str, list[str]] = {}
    for key, (_, name, _) in placed.items():
        names.setdefault(owners[key], []).append(name)
    read = paths_read(names, model, asked)
    return {key: place for key, place in placed.items() if owners[key] in read}


def _with_conditioner(place: tuple[str, str, str], model: nn.Module | None) -> tuple[str, str, str]:
    part, name, kind = place
    if part == ORIGINAL and model is not None:
        part, name = with_conditioner(part, name, model)
    return part, name, kind


def _refuse_several(placed: Mapping[str, tuple[str, str, str]]) -> None:
    """Refuses a part whose layers are of several adapters, by the names of these in keys.

    Raises:
        AdapterFileError: With the names.
    """
    names: dict[str, set[str]] = {}
    for key, (part, _, _) in placed.items():
        if (name := adapter_name(key)) is not None:
            names.setdefault(part, set()).add(name)
    several = next((own for own in names.values() if len(own) > 1), None)
    if several:
        raise AdapterFileError(
            f"The file has layers of the adapters {listing(sorted(several))}, and it cannot be told which is meant. "
            "Save one of them alone, as by get_peft_model_state_dict(model, adapter_name=...) of PEFT, or keep the "
            "keys of one in a file of its own."
        )


def _layer(name: str, factors: Mapping[str, Tensor], config: PeftConfig | None, of_all: float | None) -> PortableLayer:
    """Returns a layer. Without a config and an alpha, diffusers takes the rank for it."""
    check_factors(name, factors)
    r = len(factors["A"])
    alpha = float(factors["alpha"]) if "alpha" in factors else float(r) if of_all is None else of_all
    if config is not None:
        said = config.rank(name, factors["A"], factors["B"])
        has_magnitude = not factors.keys().isdisjoint(("magnitude", "scale"))
        config.check_parts(name, magnitude=has_magnitude, bias="bias_B" in factors)
        alpha = config.alpha(name, said) * r / rank_divisor(said, use_rslora=config.fields.get("use_rslora", False))
    magnitude = magnitude_of(name, factors["scale"], len(factors["B"])) if "scale" in factors else None
    bias = factors.get("bias_B")
    return PortableLayer(factors["A"], factors["B"], alpha, factors.get("magnitude", magnitude), bias=bias)


def _configs(metadata: Mapping[str, str], parts: Iterable[str], patterns: str | None) -> dict[str, PeftConfig]:
    """Returns PEFT's configs in the header of a file, by part."""
    if METADATA not in metadata:
        return {}
    said = parse_json(metadata[METADATA], f"The metadata {METADATA!r}")
    starts = {part: f"{part}." if part else "" for part in parts}
    fields = {
        part: {key.removeprefix(start): value for key, value in said.items() if key.startswith(start)}
        for part, start in starts.items()
    }
    # Without a version, as headers of ours, it means to diffusers what it means to PEFT now.
    known = {"peft_type": "LORA", "peft_version": WRITTEN_FOR}
    return {part: PeftConfig(known | own, patterns) for part, own in fields.items() if own}


def _configs_beside(file: Path, parts: Iterable[str], patterns: str | None) -> dict[str, PeftConfig]:
    """Returns PEFT's config beside a file that has the name of PEFT's own: it is of all parts."""
    beside = file.parent / CONFIG
    if file.name != TENSORS_OF_PEFT or not beside.is_file():
        return {}
    return dict.fromkeys(parts, PeftConfig(read_json(beside), patterns))


def _name_denoiser(
    denoiser: str,
    layers: dict[str, dict[str, PortableLayer]],
    beside: dict[str, dict[str, Beside]],
    configs: dict[str, PeftConfig],
) -> None:
    """Puts the layers of a part without a name, or with an original one, under the name of the denoiser.

    Raises:
        AdapterFileError: If the file has layers by another name of the denoiser as well.
    """
    for part in (ORIGINAL, ALONE):
        if part not in layers:
            continue
        if denoiser in layers and part == ALONE:
            raise AdapterFileError(
                "The adapter has layers of the denoiser, and others with no known part of a pipeline in front "
                f"({listing(sorted(layers[part]), 3)}): it cannot be told of what these are. Take them out of the file "
                "to load the rest."
            )
        if denoiser in layers:
            raise AdapterFileError(
                f"The adapter has layers of the denoiser as {part!r} and as {denoiser!r}, and it cannot be told which "
                "of them are meant. Take one of the two out of the file."
            )
        layers[denoiser], beside[denoiser] = layers.pop(part), beside.pop(part)
        if part in configs:
            configs[denoiser] = configs[part]


def _adapter(
    layers: Mapping[str, Mapping[str, PortableLayer]],
    beside: Mapping[str, Mapping[str, Beside]],
    paths: Mapping[str, str],
    configs: Mapping[str, PeftConfig],
) -> PortableAdapter:
    """Returns the adapter of the parts that are read; where their dropout differs, it has the largest."""
    read = [configs[part] for part in paths if part in configs]
    inits = {config.init for config in read} or {"kaiming"}
    if len(inits) > 1:
        raise AdapterFileError(f"The parts of the adapter were started in different ways: {listing(sorted(inits))}.")
    found = {full_name(path, name): layer for part, path in paths.items() for name, layer in layers[part].items()}
    changes, values = changes_and_values(
        {full_name(path, name): each for part, path in paths.items() for name, each in beside[part].items()}
    )
    details = {"parts": ", ".join(layers), "alphas": "of PEFT's configs" if configs else "of the keys, or the ranks"}
    dropout = max((config.fields.get("lora_dropout", 0.0) for config in read), default=0.0)
    return PortableAdapter(found, values, dropout=dropout, init=inits.pop(), details=details, changes=changes)


def _keys(part: str, layers: Mapping[str, PortableLayer]) -> dict[str, Tensor]:
    """Returns the tensors of a part's layers by their keys in it.

    A text encoder without layers named like CLIP's projections gets diffusers' own keys: of PEFT's keys, diffusers
    renames only those of such projections, and it refuses a file without any of them. The norms of DoRA are named like
    the parameters that they are: transformers, which reads them there, leaves out those by PEFT's shorter keys.
    """
    keys = layer_keys(layers, "")
    if not part.startswith("text_encoder"):
        return keys
    named = {f"{key}.weight" if key.endswith(_NORMS) else key: tensor for key, tensor in keys.items()}
    if any(name.endswith(CLIP_PROJECTIONS) for name in layers):
        return named
    return {own_key(key): tensor for key, tensor in named.items()}


def _fields(layers: Mapping[str, PortableLayer], adapter: PortableAdapter) -> dict[str, Any]:
    is_dora = any(layer.magnitude is not None for layer in layers.values())
    fields = config_fields(layers, lora_dropout=adapter.dropout, use_dora=is_dora)
    del fields["peft_version"]  # which not every version of PEFT takes as a field
    return fields
