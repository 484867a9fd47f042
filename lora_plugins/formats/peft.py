"""PEFT's adapters: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT up to 0.21.2 applies the update of an attention's `out_proj` twice where the attention is adapted
(huggingface/peft#3774): such a file means twice its product, which is read and written so.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import Version
from torch import Tensor, nn

from lora_plugins.adapter import ADAPTER_NAME
from lora_plugins.config import rank_divisor
from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.field_checks import choice_of, optional
from lora_plugins.files import PICKLED
from lora_plugins.formats.diffusers_keys import is_of_pipeline
from lora_plugins.formats.layer_tensors import check_factors
from lora_plugins.formats.peft_adalora import folded
from lora_plugins.formats.peft_attention import as_applied, with_attention, with_transposed
from lora_plugins.formats.peft_config import WRITTEN_FOR, PeftConfig, config_fields
from lora_plugins.formats.peft_keys import layer_keys, sorted_tensors, value_keys
from lora_plugins.formats.peft_model import for_model, saved_modules
from lora_plugins.formats.peft_values import values_for_peft
from lora_plugins.formats.peft_version import version_of
from lora_plugins.formats.places import places_by_name
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.portable_format import PortableFormat, UntoldError
from lora_plugins.formats.tensor_file import read_json, read_shapes, read_tensors, write_described_tensors
from lora_plugins.names import DEFAULT_ADAPTER
from lora_plugins.utils import read_unmixed
from lora_plugins.writable import check_writable_folder

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_TIMES: Mapping[str, int] = {"once": 1, "twice": 2}
"""How often the update of an attention's output projection counts, by the words of the option."""


class PeftFormat(PortableFormat):
    """PEFT's LoRA.

    Options of reading: `out_proj`, how often the update of an attention's output projection counts, `once` or `twice`;
    by default as the version of PEFT that wrote the file applied it. `patterns`, which of several patterns counts that
    match a layer and say different alphas, the `first` or the `longest`; by default such a file is refused.
    """

    name = "peft"
    file_names = (CONFIG, TENSORS)
    options: ClassVar[Mapping[str, Any]] = {"out_proj": None, "patterns": None}
    first_reading: ClassVar[Mapping[str, Any]] = {"out_proj": "twice", "patterns": "first"}  # PEFT's own

    def recognizes(self, path: Path) -> bool:
        """Whether a folder has PEFT's config or folders with one for named adapters, or a file is in such a folder.

        Keys of parts of a pipeline are of another format, which takes what it needs from the config.
        """
        return any(not is_of_pipeline(read_shapes(folder / TENSORS)) for folder in _folders(path))

    def load(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Reads a folder; see `PortableFormat`."""
        folder = _only_folder(path)
        fields, tensors = read_unmixed(folder / CONFIG, lambda: _read(folder))
        config = PeftConfig(fields, options["patterns"])
        tensors = folded(tensors) if config.is_adalora else tensors
        modules = places_by_name(model) if model is not None else {}
        found = sorted_tensors(tensors, modules)
        config.check_expressions([*modules, *found.factors])
        times = _times(config, options["out_proj"]) if found.in_attention else 1
        layers: dict[str, PortableLayer] = {}
        for name, factors in found.factors.items():
            within = name in found.in_attention
            said = name.rpartition(".")[0] if within else config.parameter_of(name) or name
            layer = _layer(config, name, factors, said)
            layer = replace(layer, layer_type=found.layer_types.get(name, ""))
            layers[name] = replace(layer, B=layer.B * times, in_attention=True) if within else layer
        adapter = PortableAdapter(
            layers=layers,
            values=found.values,
            name=folder.name if folder.parent == path and ADAPTER_NAME.fullmatch(folder.name) else DEFAULT_ADAPTER,
            use_rslora=config.fields.get("use_rslora", False),
            dropout=config.fields.get("lora_dropout", 0.0),
            init=config.init,
            bias=config.fields.get("bias", "none"),
            saved_modules=saved_modules(config, found.values),
            details=_details(config),
        )
        return adapter if model is None else for_model(model, adapter, config, found, options["out_proj"])

    def refusals(self, adapter: PortableAdapter) -> list[str]:
        """Returns what PEFT has no form for."""
        layers = adapter.layers.items()
        return [
            *(
                f"{name!r}: PEFT has no DoRA on attention"
                for name, each in layers
                if each.magnitude is not None and (each.layer_type == "multihead_attention" or each.in_attention)
            ),
            *("the model itself: PEFT adapts the layers in a model" for name, _ in layers if not name),
        ]

    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes a folder; see `PortableFormat`."""
        check_writable_folder(path, "path")
        layers = _in_order(with_attention(adapter), model)
        visited = [(name, layer.layer_type) for name, layer in layers.items() if not layer.in_attention]
        layers = as_applied(with_transposed(layers, visited, fan_in_fan_out=False))
        values = values_for_peft(adapter, model)
        types = {layer.layer_type for layer in layers.values()}
        fields = config_fields(
            layers,
            lora_dropout=adapter.dropout,
            bias=values.bias,
            modules_to_save=list(values.modules) or None,
            use_rslora=adapter.use_rslora,
            use_dora=any(layer.magnitude is not None for layer in layers.values()),
            fan_in_fan_out=types == {"transformers_conv1d"},
        )
        tensors = layer_keys(layers) | value_keys(values.tensors, layers)
        write_described_tensors(path / TENSORS, tensors, {"format": "pt"}, path / CONFIG, fields)
        return path


def _folders(path: Path) -> list[Path]:
    """Returns the folders of adapters that a path means."""
    if path.is_file():
        return [path.parent] if path.name == TENSORS and (path.parent / CONFIG).is_file() else []
    return [path] if (path / CONFIG).is_file() else sorted(each.parent for each in path.glob(f"*/{CONFIG}"))


def _only_folder(path: Path) -> Path:
    folders = _folders(path)
    if not folders:
        raise AdapterFileError(f"{path} is no folder with {CONFIG}, nor does it hold one.")
    if len(folders) > 1:
        raise AdapterFileError(
            f"{path} holds {len(folders)} adapters of PEFT: {listing(folder.name for folder in folders)}. Name the "
            "folder of one of them."
        )
    return folders[0]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_json(folder / CONFIG), read_tensors(_tensor_file(folder))[0]


def _tensor_file(folder: Path) -> Path:
    if (folder / TENSORS).is_file():
        return folder / TENSORS
    pickled = [each.name for each in folder.glob("adapter_model.*") if each.suffix in PICKLED]
    if pickled:
        raise AdapterFileError(
            f"{folder / pickled[0]} is a pickle, which can run anything when it is read. Load it in PEFT where you "
            "trust it, and save it again: save_pretrained writes .safetensors."
        )
    raise AdapterFileError(f"{folder} has {CONFIG} and no {TENSORS}. Copy the whole folder again.")


def _in_order(layers: Mapping[str, PortableLayer], model: nn.Module | None) -> dict[str, PortableLayer]:
    """Returns layers in the order in which PEFT adapts those of a model."""
    places = [*places_by_name(model)] if model is not None else []
    return {name: layers[name] for name in dict.fromkeys([*places, *layers]) if name in layers}


def _layer(config: PeftConfig, name: str, factors: Mapping[str, Tensor], configured: str) -> PortableLayer:
    """Returns a layer of a file from its tensors, and the name by which the config speaks of it."""
    check_factors(name, factors)
    A, B = factors["A"], factors["B"]
    config.check_parts(name, magnitude="magnitude" in factors, bias="bias_B" in factors)
    rank = config.rank(configured, A, B)
    share = len(A) / rank
    alpha = config.alpha(configured, rank) * rank_divisor(share, use_rslora=config.fields.get("use_rslora", False))
    return PortableLayer(A, B, alpha, factors.get("magnitude"), bias=factors.get("bias_B"))


def _times(config: PeftConfig, asked: str | None) -> int:
    """Returns how often the update of an attention's output projection counts."""
    optional(choice_of(*_TIMES))("format_options: out_proj", asked)
    if asked is not None:
        return _TIMES[asked]
    version = version_of(config.fields.get("peft_version") or "0")
    if version is not None and version <= Version(WRITTEN_FOR):
        return 2
    raise UntoldError(
        f"The adapter has attention layers and was written by PEFT {config.fields['peft_version']}. PEFT up to "
        f"{WRITTEN_FOR} applies the update of their `out_proj` twice; whether that version does is not known here. "
        "Say how it is meant: format_options={'out_proj': 'once'}, or 'twice'."
    )


def _details(config: PeftConfig) -> dict[str, str]:
    fields = config.fields
    named = {
        "written by": f"PEFT {fields.get('peft_version', 'of an old version')}",
        "base model": fields.get("base_model_name_or_path"),
        "targets": fields.get("target_modules"),
        "init": fields.get("init_lora_weights"),
        "dropout": fields.get("lora_dropout"),
    }
    return {key: str(value) for key, value in named.items() if value is not None}
