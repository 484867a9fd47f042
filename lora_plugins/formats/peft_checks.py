"""Checks a file of PEFT against a model: that nothing is missing, and that PEFT would compute what is computed here."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, counted, listing
from lora_plugins.formats.peft_config import PeftConfig
from lora_plugins.formats.peft_keys import PREFIX
from lora_plugins.formats.places import check_placed, places_by_name, tensor_names
from lora_plugins.formats.portable import PortableAdapter
from lora_plugins.formats.second_path import LAYERS
from lora_plugins.inplace import base_class_of, model_modules, own_parameters, own_tensor
from lora_plugins.utils import path_starts

_ADAPTED = (*LAYERS, nn.MultiheadAttention)
"""The layers that PEFT adapts where its config names them; `Conv1D` of transformers is recognized by its name."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is a `Conv1D` of transformers, which need not be installed."""
    return base_class_of(module).__name__ == "Conv1D"


def check_complete(model: nn.Module, layers: Collection[str], config: PeftConfig, former: Mapping[str, str]) -> None:
    """Checks that an adapter has all layers of a model that its config targets, and no others.

    The config may speak of modules by their former names.

    Raises:
        AdapterFileError: If some are missing, or others are there.
    """
    places = places_by_name(model)
    if nested := [name for name in layers if name.startswith(PREFIX) and name not in places]:
        raise AdapterFileError(
            f"{listing(nested)} begins with {PREFIX!r} once more: get_peft_model was called on a model that PEFT had "
            "adapted already. Call it so in PEFT, load the adapter there, and merge it with merge_and_unload()."
        )
    check_placed("layer", layers, places)
    present = {places[name].name for name in layers}
    lacking = [
        entry.name
        for entry in model_modules(model)
        if entry.name not in present
        and (isinstance(entry.module, _ADAPTED) or is_conv1d(entry.module))
        and config.is_target(former.get(entry.name, entry.name))
    ]
    if lacking:
        raise AdapterFileError(
            f"The adapter targets {counted(len(lacking), 'layer')} of this model that it has no A and B for: "
            f"{listing(lacking)}. PEFT would leave them as they start. If that is meant, name the layers it has in the "
            "target_modules of its config."
        )
    others = [name for name in layers if not _is_targeted(name, layers, places[name].names, config, former)]
    if others:
        raise AdapterFileError(
            f"The adapter has A and B for {counted(len(others), 'layer')} that its config does not target: "
            f"{listing(others)}. PEFT would leave them out, and nothing says by what they are scaled. If they are of "
            "this adapter, name them in the target_modules of its config; if not, delete their tensors."
        )


def _is_targeted(
    name: str, layers: Collection[str], names: Collection[str], config: PeftConfig, former: Mapping[str, str]
) -> bool:
    """Whether a config targets a layer of a file, which has some names in the model, or says of none that it does."""
    if not config.fields.get("target_modules") and not config.fields.get("target_parameters"):
        return True
    if name.rpartition(".")[0] in layers:  # the output projection of an attention, which is adapted with it
        return True
    names = {*names, former.get(name, name)}
    return any(config.is_target(each) or config.parameter_of(each) is not None for each in names)


def check_heads(model: nn.Module, adapter: PortableAdapter, config: PeftConfig, former: Mapping[str, str]) -> None:
    """Checks that every module that the config trains in full has a value in the file.

    The config may speak of modules by their former names.

    Raises:
        AdapterFileError: If one has none.
    """
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


def check_biases(model: nn.Module, adapter: PortableAdapter) -> None:
    """Checks that every adapted layer has a bias in the file where the config trains those; `all` can mean some.

    Raises:
        AdapterFileError: If one has none.
    """
    if adapter.bias != "lora_only":
        return
    trained = {f"{name}.bias" for name, layer in adapter.layers.items() if not layer.in_attention}
    trained -= adapter.values.keys()
    lacking = [name for name in own_parameters(model_modules(model)) if name in trained]
    if lacking:
        raise AdapterFileError(
            f"The adapter trained the biases of its layers (bias = 'lora_only') and has no values of "
            f"{listing(lacking)}. If that is meant, set bias to 'none' in its config."
        )


def check_untied(model: nn.Module, adapter: PortableAdapter) -> None:
    """Refuses a module that PEFT trained as a copy of its own, where its tensor is that of another module here.

    With `ensure_weight_tying`, PEFT can train one tensor for both, which the file then has under both names. The option
    alone does not show that: PEFT misses some ties, as in models that hold a language model.

    Raises:
        AdapterFileError: If there is one.
    """
    names = tensor_names(model)
    saved = tuple(f"{module}." for module in adapter.saved_modules)
    trained = {name: names[name] for name in adapter.values if name in names and name.startswith(saved)}
    firsts = set(trained.values())
    left = {name: first for name, first in names.items() if first in firsts and name not in adapter.values}
    if left:
        copied = sorted(name for name, first in trained.items() if first in left.values())
        raise AdapterFileError(
            f"PEFT trained a copy of {listing(copied)} and left {listing(left)} as it was, which is the same tensor in "
            "this model. Give each module a tensor of its own first, and then load the adapter."
        )


def check_copies(model: nn.Module, copies: Mapping[str, Tensor], adapter: PortableAdapter) -> None:
    """Checks that the untrained weights which a file has beside an adapter are those of the model, by its full names.

    If the init of a layer has changed its base, the file has the changed weight, so only its shape is compared.

    Raises:
        AdapterFileError: If one is another.
    """
    known = tensor_names(model)
    changed = {f"{name}.weight" for name in adapter.layers} if adapter.init != "kaiming" else frozenset()
    wrong = [
        name
        for name, tensor in copies.items()
        if name not in known or not _same_weight(own_tensor(model, known[name]), tensor, shape_only=name in changed)
    ]
    if wrong:
        raise AdapterFileError(
            f"The adapter comes with its own {listing(wrong)}, which is not the model's: it was resized or trained "
            "there. Load that weight into the model first."
        )


def check_meaning(modules: Mapping[str, nn.Module], adapter: PortableAdapter) -> None:
    """Refuses the output projection of an attention that is not adapted: PEFT ignores it until it is merged.

    If PEFT itself trained it, it got no gradients: its update is zero, and there is nothing to refuse.

    Raises:
        AdapterFileError: If there is one.
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


def check_started(modules: Mapping[str, nn.Module], adapter: PortableAdapter) -> None:
    """Refuses an adapter of layers that are not linear where its init changed the base: PEFT knows none for these.

    Raises:
        AdapterFileError: If it has some.
    """
    if adapter.init == "kaiming":
        return
    others = [name for name in adapter.layers if not isinstance(modules[name], nn.Linear)]
    if others:
        remedy = (
            "Merge it in PEFT, and use the merged model: PEFT leaves embeddings out when it converts one (0.21.2)."
            if any(isinstance(modules[name], nn.Embedding) for name in others)
            else "Save it in PEFT with path_initial_model_for_weight_conversion=..., which makes it one of the "
            "untouched base."
        )
        raise AdapterFileError(
            f"The adapter was started by {adapter.init!r}, which PEFT knows for Linear layers; {listing(others)} are "
            f"none. {remedy}"
        )


def check_parameters(modules: Mapping[str, nn.Module], adapter: PortableAdapter, config: PeftConfig) -> None:
    """Refuses an adapter of a parameter whose rows are no outputs: PEFT adds `B @ A` as it is.

    Raises:
        AdapterFileError: If there is one.
    """
    others = [
        parameter
        for name in adapter.layers
        if (parameter := config.parameter_of(name)) is not None
        and not (isinstance(modules[name], nn.Linear) and parameter.endswith(".weight"))
    ]
    if others:
        raise AdapterFileError(
            f"target_parameters: {listing(others)} is not the weight of a linear layer; its adapter has no form here."
        )


def _same_weight(own: Tensor, other: Tensor, *, shape_only: bool) -> bool:
    return own.shape == other.shape and (shape_only or torch.equal(own.detach().to(other.device, other.dtype), other))
