"""What a file of PEFT is in a model: by the present names of its modules, and checked by `peft_checks`."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError
from lora_plugins.formats.peft_attention import with_transposed
from lora_plugins.formats.peft_checks import (
    check_biases,
    check_complete,
    check_copies,
    check_heads,
    check_meaning,
    check_parameters,
    check_started,
    check_untied,
    is_conv1d,
)
from lora_plugins.formats.peft_config import PeftConfig
from lora_plugins.formats.peft_keys import PeftTensors
from lora_plugins.formats.places import places_by_name, tensor_names
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.second_path import warn_of_second_paths
from lora_plugins.inplace import model_modules, own_buffers
from lora_plugins.plan import current_name, former_names
from lora_plugins.utils import path_starts, within

Entry = TypeVar("Entry")


def for_model(
    model: nn.Module, adapter: PortableAdapter, config: PeftConfig, found: PeftTensors, out_proj: str | None
) -> PortableAdapter:
    """Returns an adapter of a file under the names of a model, once it is known to be complete and unambiguous.

    What is said of `out_proj` is how often the update of an attention's output projection counts.

    Raises:
        AdapterFileError: If a layer that the config targets, or a head or bias that it trains, is missing, an unchanged
            weight in the file is not the model's, or a layer means one thing merged and another unmerged.
    """
    places = places_by_name(model)
    modules = {name: entry.module for name, entry in places.items()}
    names = _present_names(model, places, [*adapter.layers, *adapter.saved_modules])
    tensors = _present_names(model, tensor_names(model), [*adapter.values, *found.copies])
    adapter = replace(
        adapter,
        layers=_renamed_all(adapter.layers, names.__getitem__),
        values=_renamed_all(adapter.values, tensors.__getitem__),
        saved_modules=[names[root] for root in adapter.saved_modules],
    )
    untrained = _untrained(model, adapter)
    adapter = replace(adapter, values={name: each for name, each in adapter.values.items() if name not in untrained})
    former = _former(model, names | tensors)
    check_complete(model, adapter.layers, config, former)
    check_heads(model, adapter, config, former)
    check_biases(model, adapter)
    check_untied(model, adapter)
    copies = {tensors[name]: tensor for name, tensor in found.copies.items()}
    check_copies(model, copies | untrained, adapter)
    if out_proj is None:
        check_meaning(modules, adapter)
    check_started(modules, adapter)
    check_parameters(modules, adapter, config)
    adapter = replace(adapter, layers=_transposed(adapter.layers, modules, config, former))
    adapted = {name: places[name] for name in adapter.layers}
    warn_of_second_paths(model, adapted, "The adapter is loaded as what it is when merged.")
    return adapter


def _transposed(
    layers: Mapping[str, PortableLayer],
    modules: Mapping[str, nn.Module],
    config: PeftConfig,
    former: Mapping[str, str],
) -> dict[str, PortableLayer]:
    """Returns layers with those output projections of attentions transposed that PEFT transposes in this model."""
    visited = [
        (name, _layer_type(module))
        for name, module in modules.items()
        if name in layers and (not layers[name].in_attention or config.is_target(former.get(name, name)))
    ]
    return with_transposed(layers, visited, fan_in_fan_out=bool(config.fields.get("fan_in_fan_out")))


def in_model(
    model: nn.Module, layers: Mapping[str, PortableLayer], config: PeftConfig | None
) -> dict[str, PortableLayer]:
    """Returns layers of a file by the names of a model, once they are known to be complete.

    Raises:
        AdapterFileError: If a layer that the config targets is missing.
    """
    found = present(model, layers)
    if config is not None:
        check_complete(model, found, config, _former(model, _present_names(model, places_by_name(model), layers)))
    return found


def present(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns what a file has for modules by the names of a model."""
    return _renamed_all(entries, _present_names(model, places_by_name(model), entries).__getitem__)


def saved_modules(config: PeftConfig, values: Iterable[str]) -> list[str]:
    """Returns the modules of a file that were trained in full, by the names of their tensors.

    Raises:
        AdapterFileError: If one is inside another, where PEFT loses what was trained.
    """
    owners = sorted({name.rpartition(".")[0] for name in values})
    saved = [[path for path in reversed(path_starts(owner)) if config.is_saved(path)] for owner in owners]
    nested = [paths for paths in saved if len(paths) > 1]
    if nested:
        raise AdapterFileError(
            f"modules_to_save names {nested[0][1]!r}, and {nested[0][0]!r} around it. PEFT trains the outer, writes "
            "the first values of the inner one over the trained ones, and cannot read the file itself: what was "
            "trained is lost."
        )
    return sorted({paths[0] for paths in saved if paths})


def _layer_type(module: nn.Module) -> str:
    """Returns the type of a layer as far as PEFT's `fan_in_fan_out` depends on it."""
    if is_conv1d(module):
        return "transformers_conv1d"
    if isinstance(module, nn.MultiheadAttention):
        return "multihead_attention"
    return "linear" if isinstance(module, nn.Linear) else ""


def _present_names(model: nn.Module, known: Collection[str], names: Iterable[str]) -> dict[str, str]:
    """Returns the present names of modules or tensors by their names in a file; `known` are all that the model has."""
    names = list(names)
    lost = [name for name in names if name not in known]
    current = current_name(model) if lost else str
    return {name: name if name in known else current(name) for name in names}


def _former(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Returns the former names of modules where a file uses some; empty for most files."""
    return former_names(model) if any(old != new for old, new in names.items()) else {}


def _renamed_all(entries: Mapping[str, Entry], rename: Callable[[str], str]) -> dict[str, Entry]:
    """Returns entries of a file by their present names.

    Raises:
        AdapterFileError: If two of them have one.
    """
    found: dict[str, tuple[str, Entry]] = {}
    for name in sorted(entries):
        other, _ = found.setdefault(rename(name), (name, entries[name]))
        if other != name:
            raise AdapterFileError(f"{other!r} and {name!r} of the adapter are both {rename(name)!r} in this model.")
    return {name: entry for name, (_, entry) in found.items()}


def _untrained(model: nn.Module, adapter: PortableAdapter) -> dict[str, Tensor]:
    """Returns the values that nothing trained: buffers called bias, which PEFT saves with the biases of a model."""
    first, saved = tensor_names(model), set(adapter.saved_modules)
    buffers = own_buffers(model_modules(model))
    values = adapter.values.items()
    return {name: value for name, value in values if first.get(name) in buffers and not within(name, saved)}
