"""Restores the adapters of a checkpoint on a module, and completes its state dicts with the base."""

import copy
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.adapter import adapter_tensors, model_state, whole
from lora_plugins.errors import listing
from lora_plugins.files import PackedAdapter, by_same_plugins, fingerprint, same, versions_told
from lora_plugins.inplace import named_tensors, own_tensor
from lora_plugins.integrations.lightning.checkpoint.callback_states import with_base_of_callbacks
from lora_plugins.integrations.lightning.checkpoint.comparison import (
    check_no_surplus,
    check_same_adapter,
    check_same_config,
    locate_adapter,
)
from lora_plugins.integrations.lightning.checkpoint.entry import checked_entry, entry_errors
from lora_plugins.integrations.lightning.checkpoint.state_dicts import (
    StateDict,
    map_state_dicts,
    state_key,
    with_hidden,
)
from lora_plugins.integrations.lightning.module import (
    adapters_by_place,
    built_alike,
    equal,
    frozen_keys,
    lost_layers,
    mark_merged,
    mark_moved,
    merged_weights,
    moved_by_hand,
    name_mapper,
    not_as_built,
    note_built,
    outside,
    take_fingerprints,
)
from lora_plugins.plugins import registry_of
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
        _put_base(module, entry.get("base", []), entry.get("pretrained", {}), merged, undo)
        check_no_surplus([*adapters_by_place(module), *awaited], entry)
        _check_left_out(module, entry, keep_moved=keep_moved)
        whole = bool(entry.get("whole"))
        # Before one is overwritten.
        located = _in_order([_located(module, each, state, awaited, whole=whole) for each in entry["adapters"]])
        for adapter, place in zip(entry["adapters"], located, strict=True):
            _attach_or_overwrite(place, undo)
            _set_active(place.target, place.name, adapter["active"], adapter["weight"])
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


def _put_base(
    module: nn.Module,
    keys: list[str],
    pretrained: Mapping[str, dict[str, float]],
    saved: Mapping[str, Tensor],
    undo: ExitStack,
) -> None:
    """Puts the merged weights of a checkpoint into the module; `undo` puts back what they replace."""
    found = named_tensors(module, aliases=True)
    _check_base(module, found, keys, pretrained, saved)
    for name in keys:  # before another name of one is written
        undo.callback(_put_back_base, module, name, found[name].detach().clone())
    for name in keys:
        found[name].data.copy_(saved[name])
    if keys:
        mark_merged(module, {name: pretrained.get(name, {}) for name in keys})
        for adapter in adapters_by_place(module).values():
            adapter.fingerprints.clear()  # of the base that was


def _check_base(
    module: nn.Module,
    found: Mapping[str, Tensor],
    keys: list[str],
    pretrained: Mapping[str, dict[str, float]],
    saved: Mapping[str, Tensor],
) -> None:
    """Checks that the module has the base whose weights an adapter was merged into before."""
    own = merged_weights(module)
    merged = own.keys() - saved.keys()
    if merged:
        raise AdapterFileError(
            f"The checkpoint was trained on another base: an adapter was merged into {listing(sorted(merged), 3)} of "
            "this module when an earlier fit ended. Make the module again, or give the trainer the same LoraCallback."
        )
    for name in keys:
        if name not in found or found[name].shape != saved[name].shape:
            raise AdapterFileError(
                f"The checkpoint was trained on another base: {type(module).__name__} has no {name!r} of shape "
                f"{list(saved[name].shape)}."
            )
    other = [name for name in pretrained if not torch.equal(found[name], saved[name].to(found[name]))]
    before = {name: own[name] if name in own else fingerprint(found[name]) for name in other}
    wrong = [name for name, values in before.items() if values and not same(values, pretrained[name])]
    if wrong:
        raise AdapterFileError(
            f"The checkpoint was trained on another base: {listing(wrong)} differ from the pretrained weights that an "
            f"adapter was merged into before ({len(wrong)} of {len(before)} weights). The checkpoint has the merged "
            "ones, and leaves the rest of that base out: load its own pretrained weights first, unmerged."
        )


def _check_left_out(module: nn.Module, entry: Mapping[str, Any], *, keep_moved: bool) -> None:
    """Checks that what a checkpoint leaves out has the values that it had when the checkpoint was written."""
    expected = entry.get("outside", {})
    other, built = not_as_built(module, expected), built_alike(module, expected)
    _check_moved(module, built.intersection(other) | moved_by_hand(module).intersection(entry["left_out"]), keep_moved)
    wrong = [name for name in other if name not in built]
    if wrong:
        raise AdapterFileError(
            f"The checkpoint leaves {listing(wrong, 3)} out ({len(wrong)} frozen tensors outside of the target), and "
            f"{type(module).__name__} has other values there than the module that was trained had by then. Build it "
            "with the same values: the same pretrained weights, or the same seed if they are random."
        )


def _check_moved(module: nn.Module, moved: Set[str], keep: bool) -> None:
    """Names what a checkpoint leaves out since it was frozen, and this very module has moved by hand since."""
    if not moved:
        return
    told = (
        f"The checkpoint was written before this {type(module).__name__} moved {listing(sorted(moved), 3)} by hand, as "
        "the average of a teacher, and leaves that out: there are other values there"
    )
    if not keep:
        raise AdapterFileError(f"{told} now. Load the checkpoint into a new module.")
    rank_zero_warn(f"{told} than it was measured with. They are kept; all else is that of the checkpoint.")


@dataclass(frozen=True)
class _Located:
    """An adapter of a checkpoint, held against the module.

    Args:
        target: Where it belongs.
        name: Its name.
        packed: The adapter.
        is_present: Whether the target has it already.
        own: That of the target, if its tensors can take the values; None where its layers, or the base, have to change.
    """

    target: nn.Module
    name: str
    packed: PackedAdapter
    is_present: bool
    own: PackedAdapter | None


def _located(
    module: nn.Module,
    adapter: Mapping[str, Any],
    saved: Mapping[str, Any],
    awaited: Mapping[tuple[str, str], LoraConfig],
    *,
    whole: bool,
) -> _Located:
    """Finds the place of an adapter, and checks it against the one that is there.

    A whole checkpoint is of this module, and brings the base that an init has changed as well.
    """
    target, packed = locate_adapter(module, adapter, saved)
    name, state = str(packed.manifest.get("adapter_name")), model_state(target)
    if state is None or name not in state.adapters:
        if (wanted := awaited.get((adapter["target"], name))) is not None:
            check_same_config(name, wanted.to_dict(), packed)
        return _Located(target, name, packed, is_present=False, own=None)
    config = state.adapters[name].plan.config
    check_same_config(name, config.to_dict(), packed)
    own = None if lost_layers(target, name) else LoraModel(target).pack(name)
    if own is not None and not (whole or _is_rebuilt_alike(own, packed)):
        own = None
    if own is not None:
        with versions_told(packed.manifest, registry_of(config)):
            check_same_adapter(name, own, packed)
    return _Located(target, name, packed, is_present=True, own=own)


def _is_rebuilt_alike(own: PackedAdapter, packed: PackedAdapter) -> bool:
    """Whether two adapters have the same changed base, not by a plugin that was installed since.

    LoftQ changes bases otherwise on other machines.
    """
    return by_same_plugins(own, packed) and own.manifest["changed"] == packed.manifest["changed"]


def _in_order(located: Sequence[_Located]) -> list[_Located]:
    """Marks all adapters of a target to be put on anew if they would otherwise be in another order than in the file.

    The state of an optimizer belongs to parameters by their order, and what is put on anew comes last.
    """
    anew: set[int] = set()
    for target in {id(place.target): place.target for place in located}.values():
        places, state = [place for place in located if place.target is target], model_state(target)
        present = [] if state is None else [*state.adapters]
        in_order = [place.name for place in places][: len(present)] == present
        if not in_order or any(place.is_present and place.own is None for place in places):
            anew.add(id(target))
    return [replace(place, own=None) if id(place.target) in anew else place for place in located]


def _attach_or_overwrite(place: _Located, undo: ExitStack) -> None:
    """Attaches an adapter to its target, or overwrites the values of the present one, so that it can be undone."""
    if not place.is_present:
        _attach(place)
        undo.callback(lambda: LoraModel(place.target).delete_adapter(place.name))
        return
    if place.own is None:
        whole(place.target, lambda: _put_anew(place))
        return
    with torch.no_grad():
        for key, tensor in place.own.tensors.items():
            undo.callback(_put_back, tensor, tensor.clone())
            tensor.copy_(place.packed.tensors[key])


def _put_back(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)


def _put_back_base(module: nn.Module, name: str, value: Tensor) -> None:
    _put_back(own_tensor(module, name), value)


def _put_anew(place: _Located) -> None:
    """Attaches an adapter in place of the present one; what was frozen of that, as of a copy, stays frozen."""
    frozen = [name for name, parameter in adapter_tensors(place.target).items() if not parameter.requires_grad]
    LoraModel(place.target).delete_adapter(place.name)
    _attach(place)
    now = adapter_tensors(place.target)
    for name in frozen:
        now[name].requires_grad_(False)


def _attach(place: _Located) -> None:
    """Attaches an adapter with copies: hooks of the module write tensors of a checkpoint, and two may share memory."""
    copies = {key: tensor.clone() for key, tensor in place.packed.tensors.items()}
    LoraModel.load_packed(place.target, replace(place.packed, tensors=copies), place.name)


def _set_active(target: nn.Module, name: str, active: bool, weight: float) -> None:
    lora = LoraModel(target)
    now = lora.active_weights
    others = {other: share for other, share in now.items() if other != name}
    wanted = {**now, name: weight} if active else others
    if wanted != now:
        lora.set_adapter([*wanted], weights=[*wanted.values()])


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
