"""The adapters of a checkpoint, held against those of the module, and put onto it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.adapter import adapter_tensors, model_state, whole
from lora_plugins.files import PackedAdapter, by_same_plugins, versions_told
from lora_plugins.integrations.lightning.checkpoint.comparison import (
    check_same_adapter,
    check_same_config,
    locate_adapter,
)
from lora_plugins.integrations.lightning.module import lost_layers
from lora_plugins.plugins import registry_of


@dataclass(frozen=True)
class LocatedAdapter:
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


def located_adapter(
    module: nn.Module,
    adapter: Mapping[str, Any],
    saved: Mapping[str, Any],
    awaited: Mapping[tuple[str, str], LoraConfig],
    *,
    is_whole: bool,
) -> LocatedAdapter:
    """Finds the place of an adapter, and checks it against the one that is there.

    A whole checkpoint is of this module, and brings the base that an init has changed as well.
    """
    target, packed = locate_adapter(module, adapter, saved)
    name, state = str(packed.manifest.get("adapter_name")), model_state(target)
    if state is None or name not in state.adapters:
        if (wanted := awaited.get((adapter["target"], name))) is not None:
            check_same_config(name, wanted.to_dict(), packed)
        return LocatedAdapter(target, name, packed, is_present=False, own=None)
    config = state.adapters[name].plan.config
    check_same_config(name, config.to_dict(), packed)
    own = None if lost_layers(target, name) else LoraModel(target).pack(name)
    if own is not None and not (is_whole or _is_rebuilt_alike(own, packed)):
        own = None
    if own is not None:
        with versions_told(packed.manifest, registry_of(config)):
            check_same_adapter(name, own, packed)
    return LocatedAdapter(target, name, packed, is_present=True, own=own)


def _is_rebuilt_alike(own: PackedAdapter, packed: PackedAdapter) -> bool:
    """Whether two adapters have the same changed base, not by a plugin that was installed since.

    LoftQ changes bases otherwise on other machines.
    """
    return by_same_plugins(own, packed) and own.manifest["changed"] == packed.manifest["changed"]


def in_order(located: Sequence[LocatedAdapter]) -> list[LocatedAdapter]:
    """Marks all adapters of a target to be put on anew if they would otherwise be in another order than in the file.

    The state of an optimizer belongs to parameters by their order, and what is put on anew comes last.
    """
    anew: set[int] = set()
    for target in {id(place.target): place.target for place in located}.values():
        places, state = [place for place in located if place.target is target], model_state(target)
        present = [] if state is None else [*state.adapters]
        is_in_order = [place.name for place in places][: len(present)] == present
        if not is_in_order or any(place.is_present and place.own is None for place in places):
            anew.add(id(target))
    return [replace(place, own=None) if id(place.target) in anew else place for place in located]


def attach_or_overwrite(place: LocatedAdapter, undo: ExitStack) -> None:
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


def _put_anew(place: LocatedAdapter) -> None:
    """Attaches an adapter in place of the present one; what was frozen of that, as of a copy, stays frozen."""
    frozen = [name for name, parameter in adapter_tensors(place.target).items() if not parameter.requires_grad]
    LoraModel(place.target).delete_adapter(place.name)
    _attach(place)
    now = adapter_tensors(place.target)
    for name in frozen:
        now[name].requires_grad_(False)


def _attach(place: LocatedAdapter) -> None:
    """Attaches an adapter with copies: hooks of the module write tensors of a checkpoint, and two may share memory."""
    copies = {key: tensor.clone() for key, tensor in place.packed.tensors.items()}
    LoraModel.load_packed(place.target, replace(place.packed, tensors=copies), place.name)


def set_active(target: nn.Module, name: str, active: bool, weight: float) -> None:
    """Makes an adapter act, or not, beside those that do, with this multiple of its update."""
    lora = LoraModel(target)
    now = lora.active_weights
    others = {other: share for other, share in now.items() if other != name}
    wanted = {**now, name: weight} if active else others
    if wanted != now:
        lora.set_adapter([*wanted], weights=[*wanted.values()])
