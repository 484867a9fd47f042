"""Checks a file of PEFT against a model: former names, missing layers, and what PEFT would compute differently."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.peft_config import PeftConfig
from lora_plugins.formats.peft_keys import PeftTensors
from lora_plugins.formats.places import places_by_name, tensor_names
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.second_path import LAYERS, warn_of_second_paths
from lora_plugins.inplace import base_class_of, full_name, model_modules, own_tensor, own_tensors
from lora_plugins.plan import current_name, former_names
from lora_plugins.utils import path_starts, within

Entry = TypeVar("Entry")

_ADAPTED = (*LAYERS, nn.MultiheadAttention)
"""The layers that PEFT adapts where its config names them; `Conv1D` of transformers is recognized by its name."""


def for_model(
    model: nn.Module, adapter: PortableAdapter, config: PeftConfig, found: PeftTensors, out_proj: str | None
) -> PortableAdapter:
    """Returns an adapter of a file under the names of a model, once it is known to be complete and unambiguous.

    Args:
        model: The model, with the base's own values in place.
        adapter: The adapter, with the names of the file.
        config: The file's config.
        found: The file's tensors.
        out_proj: How often an update of an attention's output projection was said to count.

    Raises:
        AdapterFileError: If a layer that the config targets, or a head or bias that it trains, is missing, an unchanged
            weight in the file is not the model's, or a layer means one thing merged and another unmerged.
    """
    places = places_by_name(model)
    modules = {name: entry.module for name, entry in places.items()}
    names = _present_names(model, [*adapter.layers, *_owners(adapter.values), *adapter.saved_modules])
    adapter = replace(
        adapter,
        layers=_renamed_all(adapter.layers, names.__getitem__),
        values=_renamed_all(adapter.values, lambda name: _renamed(name, names)),
        saved_modules=[names[root] for root in adapter.saved_modules],
    )
    untrained = _untrained(model, adapter)
    adapter = replace(adapter, values={name: each for name, each in adapter.values.items() if name not in untrained})
    check_complete(model, adapter.layers, config, renamed=_differ(names))
    _check_heads(model, adapter, config, renamed=_differ(names))
    _check_biases(model, adapter)
    _check_untied(model, adapter, config)
    _check_copies(model, {_renamed(name, names): tensor for name, tensor in found.copies.items()} | untrained)
    if out_proj is None:
        _check_meaning(modules, adapter)
    _check_started(modules, adapter)
    _check_parameters(modules, adapter, config)
    adapted = {name: places[name] for name in adapter.layers if name in places}
    warn_of_second_paths(model, adapted, "The adapter is loaded as what it is when merged.")
    return adapter


def _present_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Returns the present name of each module of a file, by the name in the file."""
    known = places_by_name(model)
    lost = [name for name in names if name not in known]
    current = current_name(model) if lost else str
    return {name: name if name in known else current(name) for name in names}


def _differ(names: Mapping[str, str]) -> bool:
    """Whether a file uses former names of modules."""
    return any(old != new for old, new in names.items())


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


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Returns the present name of a tensor."""
    owner, _, own = name.rpartition(".")
    return full_name(names.get(owner, owner), own)


def _untrained(model: nn.Module, adapter: PortableAdapter) -> dict[str, Tensor]:
    """Returns the values that nothing trained: buffers called bias, which PEFT saves with the biases of a model."""
    first, saved = tensor_names(model), set(adapter.saved_modules)
    buffers = own_tensors(model_modules(model), "_buffers")
    values = adapter.values.items()
    return {name: value for name, value in values if first.get(name) in buffers and not within(name, saved)}


def _owners(values: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in values}


def saved_modules(config: PeftConfig, values: Iterable[str]) -> list[str]:
    """Returns the modules of a file that were trained in full, by the names of their tensors.

    Raises:
        AdapterFileError: If one is inside another, where PEFT loses what was trained.
    """
    saved = [_saved_around(config, owner) for owner in sorted(_owners(values))]
    nested = [paths for paths in saved if len(paths) > 1]
    if nested:
        raise AdapterFileError(
            f"modules_to_save names {nested[0][1]!r}, and {nested[0][0]!r} around it. PEFT trains the outer, writes "
            "the first values of the inner one over the trained ones, and cannot read the file itself: what was "
            "trained is lost."
        )
    return sorted({paths[0] for paths in saved if paths})


def _saved_around(config: PeftConfig, owner: str) -> list[str]:
    """Returns the modules, of one and those around it, that were trained in full."""
    parts = owner.split(".")
    paths = (".".join(parts[: at + 1]) for at in range(len(parts)))
    return [path for path in paths if path and config.is_saved(path)]


def in_model(
    model: nn.Module, layers: Mapping[str, PortableLayer], config: PeftConfig | None
) -> dict[str, PortableLayer]:
    """Returns layers of a file by the names of a model, once they are known to be complete.

    Raises:
        AdapterFileError: If a layer that the config targets is missing.
    """
    names = _present_names(model, layers)
    found = _renamed_all(layers, names.__getitem__)
    if config is not None:
        check_complete(model, found, config, renamed=_differ(names))
    return found


def check_complete(model: nn.Module, layers: Iterable[str], config: PeftConfig, *, renamed: bool) -> None:
    """Checks that an adapter has all layers of a model that its config targets.

    Args:
        model: The model.
        layers: Names of the layers that it has.
        config: The config.
        renamed: Whether the config speaks of the modules by their former names.

    Raises:
        AdapterFileError: If some are missing.
    """
    former = former_names(model) if renamed else {}
    places = places_by_name(model)
    present = {places[name].name for name in layers if name in places}
    lacking = [
        entry.name
        for entry in model_modules(model)
        if entry.name not in present
        and (isinstance(entry.module, _ADAPTED) or base_class_of(entry.module).__name__ == "Conv1D")
        and config.is_target(former.get(entry.name, entry.name))
    ]
    if lacking:
        raise AdapterFileError(
            f"The adapter targets {len(lacking)} layers of this model that it has no A and B for: {listing(lacking)}. "
            "PEFT would leave them as they start. If that is meant, name the layers it has in the target_modules of "
            "its config."
        )


def _check_heads(model: nn.Module, adapter: PortableAdapter, config: PeftConfig, *, renamed: bool) -> None:
    """Checks that every module that the config trains in full has a value in the file."""
    former = former_names(model) if renamed else {}
    around = {start for value in adapter.values for start in path_starts(value)[1:]}
    lacking = [
        entry.name
        for entry in model_modules(model)
        if entry.name
        and config.is_saved(former.get(entry.name, entry.name))
        and any(True for _ in entry.module.parameters())
        and entry.name not in around
    ]
    if lacking:
        raise AdapterFileError(
            f"The adapter trained {listing(lacking)} in full (modules_to_save) and has no values of it. If it was "
            "left out on purpose, take it out of modules_to_save in the config."
        )


def _check_biases(model: nn.Module, adapter: PortableAdapter) -> None:
    """Checks that every adapted layer has a bias in the file where the config trains those; `all` can mean some."""
    if adapter.bias != "lora_only":
        return
    trained = {f"{name}.bias" for name, layer in adapter.layers.items() if not layer.in_attention}
    trained -= adapter.values.keys()
    lacking = [name for name in own_tensors(model_modules(model), "_parameters") if name in trained]
    if lacking:
        raise AdapterFileError(
            f"The adapter trained the biases of its layers (bias = 'lora_only') and has no values of "
            f"{listing(lacking)}. If that is meant, set bias to 'none' in its config."
        )


def _check_untied(model: nn.Module, adapter: PortableAdapter, config: PeftConfig) -> None:
    """Refuses a module that PEFT trained as a copy of its own, where its tensor is that of another module here."""
    if config.fields.get("ensure_weight_tying"):
        return
    names = tensor_names(model)
    saved = tuple(f"{module}." for module in adapter.saved_modules)
    trained = {names[name] for name in adapter.values if name in names and name.startswith(saved)}
    left = [name for name, first in names.items() if first in trained and name not in adapter.values]
    if left:
        raise AdapterFileError(
            f"PEFT trained a copy of {listing(sorted(trained & {names[name] for name in left}))} and left "
            f"{listing(left)} as it was, which is the same tensor in this model. Give each module a tensor of its own "
            "first, and then load the adapter."
        )


def _check_copies(model: nn.Module, copies: Mapping[str, Tensor]) -> None:
    known = tensor_names(model)
    wrong = [
        name
        for name, tensor in copies.items()
        if name not in known or not _same_weight(own_tensor(model, known[name]), tensor)
    ]
    if wrong:
        raise AdapterFileError(
            f"The adapter comes with its own {listing(wrong)}, which is not the model's: it was resized or trained "
            "there. Load that weight into the model first."
        )


def _same_weight(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and torch.equal(own.detach().to(other.device, other.dtype), other)


def _check_meaning(modules: Mapping[str, nn.Module], adapter: PortableAdapter) -> None:
    """Refuses the output projection of an attention that is not adapted: PEFT ignores it until it is merged.

    One that PEFT itself has trained got no gradients, so that its update is zero and has one meaning.
    """
    alone = [
        name
        for name, layer in adapter.layers.items()
        if not layer.in_attention
        and (layer.B.any() or layer.magnitude is not None)
        and name.rpartition(".")[2] == "out_proj"
        and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    if alone:
        raise AdapterFileError(
            f"{listing(alone)} has two meanings: PEFT ignores the output projection of an attention until it is "
            "merged. To load what it is when merged, say format_options={'out_proj': 'once'}."
        )


def _check_started(modules: Mapping[str, nn.Module], adapter: PortableAdapter) -> None:
    if adapter.init == "kaiming":
        return
    others = [name for name in adapter.layers if name in modules and not isinstance(modules[name], nn.Linear)]
    if others:
        raise AdapterFileError(
            f"The adapter was started by {adapter.init!r}, which PEFT knows for Linear layers; {listing(others)} are "
            "none. Save it in PEFT with path_initial_model_for_weight_conversion=..., which makes it one of the "
            "untouched base."
        )


def _check_parameters(modules: Mapping[str, nn.Module], adapter: PortableAdapter, config: PeftConfig) -> None:
    """Refuses an adapter of a parameter whose rows are no outputs: PEFT adds `B @ A` as it is."""
    others = [
        parameter
        for name in adapter.layers
        if (parameter := config.parameter_of(name)) is not None
        and not (isinstance(modules.get(name), nn.Linear) and parameter.endswith(".weight"))
    ]
    if others:
        raise AdapterFileError(
            f"target_parameters: {listing(others)} is not the weight of a linear layer; its adapter has no form here."
        )
