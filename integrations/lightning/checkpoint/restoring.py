"""Restores the adapters of a checkpoint on a module, and completes its state dicts with the base."""

import copy
from collections.abc import Mapping, Set
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

from torch import nn

from lora_plugins import AdapterFileError, LoraConfig
from lora_plugins.errors import listing
from lora_plugins.inplace import named_tensors
from lora_plugins.integrations.lightning.checkpoint.callback_states import with_base_of_callbacks
from lora_plugins.integrations.lightning.checkpoint.comparison import check_no_surplus
from lora_plugins.integrations.lightning.checkpoint.entry import checked_entry, entry_errors
from lora_plugins.integrations.lightning.checkpoint.known_base import check_left_out, put_base
from lora_plugins.integrations.lightning.checkpoint.located_adapters import (
    attach_or_overwrite,
    in_order,
    located_adapter,
    set_active,
)
from lora_plugins.integrations.lightning.checkpoint.state_dicts import (
    StateDict,
    map_state_dicts,
    state_key,
    with_hidden,
)
from lora_plugins.integrations.lightning.module import (
    adapters_by_place,
    equal,
    frozen_keys,
    mark_moved,
    name_mapper,
    note_built,
    outside,
    take_fingerprints,
)
from lora_plugins.utils import plain_name


def restore(
    module: nn.Module,
    checkpoint: Mapping[str, Any],
    *,
    keep_moved: bool = False,
    again: bool = False,
    awaited: Mapping[tuple[str, str], LoraConfig] = MappingProxyType({}),
) -> dict[str, Any]:
    """Puts the adapters of a checkpoint on a module and returns the checkpoint with complete state dicts.

    Adapters that the module has already keep their parameters, so that an optimizer goes on with them.

    Args:
        module: The module, with the base it had when the checkpoint was written.
        checkpoint: What `shrink` returned; it is not changed.
        keep_moved: Whether to go on, with a warning, if it leaves out what the module has moved by hand since.
        again: Whether it was restored before; the module's own hook may have filled in what the file leaves out.
        awaited: The adapters that the checkpoint has to bring, by target and name.

    Raises:
        AdapterFileError: If the entry is damaged or newer, or does not fit the module. Adapters that were not on the
            module before are removed again.
    """
    entry = checked_entry(checkpoint)
    state = {plain_name(key): value for key, value in checkpoint.get("state_dict", {}).items()}  # as the entry has them
    with ExitStack() as undo, entry_errors():
        merged = {**entry.get("base_tensors", {}), **state}
        put_base(module, entry, merged, undo)
        check_no_surplus([*adapters_by_place(module), *awaited], entry)
        check_left_out(module, entry, keep_moved=keep_moved)
        whole = bool(entry.get("whole"))
        # Before one is overwritten.
        found = [located_adapter(module, each, state, awaited, is_whole=whole) for each in entry["adapters"]]
        located = in_order(found)
        for adapter, place in zip(entry["adapters"], located, strict=True):
            attach_or_overwrite(place, undo)
            set_active(place.target, place.name, adapter["active"], adapter["weight"])
        note_built(module, entry.get("outside", {}))
        take_fingerprints(module)
        if not whole:  # by hand, or by training, in the run that wrote it
            held = (frozen_keys(module) | outside(module).keys()).intersection(state)
            mark_moved(module, _with_other_values(module, state, held) if again else held)
        complete = _complete(module, checkpoint, entry)
        undo.pop_all()
    return complete


def _with_other_values(module: nn.Module, state: StateDict, names: Set[str]) -> set[str]:
    """Returns the names under which a state dict has other values than the module."""
    found = named_tensors(module, aliases=True)
    return {name for name in names if name not in found or not equal(found[name], state[name])}


def _complete(module: nn.Module, checkpoint: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint whose state dicts have all that was put into the module, and the base that was left out.

    A module's own `on_save_checkpoint` may have taken keys of adapters, or of merged weights, out: then their tensors
    are in the entry. One that it has renamed is whole, and its `on_load_checkpoint` renames it back.
    """
    own, rename = module.state_dict(), name_mapper(module)
    current = with_hidden(own, module)
    left_out = [rename(key) for key in entry["left_out"]]
    unknown = [key for key in left_out if key not in current]
    if unknown:
        raise AdapterFileError(
            f"The checkpoint was trained on another base: {type(module).__name__} has no {listing(unknown)} "
            f"({len(unknown)} of {len(left_out)} frozen tensors)."
        )
    restored = [
        rename(state_key(adapter["target"], str(adapter["manifest"].get("adapter_name")), key))
        for adapter in entry["adapters"]
        for key in adapter["tensors"]
    ]
    taken_out = map(rename, entry.get("base_tensors", {}))
    present = {key: current[key] for key in left_out} | {key: own[key] for key in (*restored, *taken_out) if key in own}

    def completed(state: StateDict) -> StateDict:
        named = {rename(key): value for key, value in state.items()}
        if named and not named.keys() & current.keys():
            return named
        complete: StateDict = copy.copy(own)  # which has the versions of layers, by which some read their values
        complete.clear()
        # Those of the file first: Lightning's loader puts the module on the device that the first one is on.
        complete.update({**named, **{key: value for key, value in present.items() if key not in named}})
        return complete

    of_callbacks = [(path, current[rename(name)]) for path, name in entry.get("of_callbacks", [])]
    return map_state_dicts(with_base_of_callbacks(checkpoint, of_callbacks), completed)
