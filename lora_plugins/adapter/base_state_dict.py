"""Loading a state dict of the untouched model, or of a part of it, into an adapted one."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter.owned_tensors import OwnedTensors
from lora_plugins.adapter.state import ModelState, adapted_layers, model_state
from lora_plugins.errors import StateError
from lora_plugins.inplace import SUFFIX, factors_of, full_name, holder_of, is_shard, named_tensors, own_tensor
from lora_plugins.utils import plain_name


def accept_base(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a state dict of the untouched model load strictly: adapters that it does not mention keep their values."""
    state = model_state(model)
    if state is None:
        return
    state.check("load_state_dict")
    tensors = {prefix + key: tensor for key, tensor in factors_of(model).items()}
    if not tensors.keys() & state_dict.keys():
        own = (key for key in state_dict if key.startswith(prefix))
        _take_base(model, state, state_dict, {key: plain_name(key.removeprefix(prefix)) for key in own})
        state_dict.update(tensors)
    _forget_base(model, state)


def accept_base_of_part(model: nn.Module, part: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Lets a state dict of a part of the untouched model load strictly into that part, as `accept_base` does."""
    state = model_state(model)
    if state is None:
        return
    state.check("load_state_dict")
    path = next(name for name, each in model.named_modules() if each is part)
    _take_base(model, state, state_dict, {key: plain_name(full_name(path, key)) for key in state_dict})
    state_dict.update({prefix + key: tensor for key, tensor in factors_of(part).items()})
    _forget_base(model, state)


def _take_base(model: nn.Module, state: ModelState, state_dict: dict[str, Any], names: Mapping[str, str]) -> None:
    """Takes the base's heads, biases and statistics out of a state dict, where adapters have values of their own.

    Where an adapter's own value is in place, the state dict loads that one afterwards. `names` are the full names of
    tensors by key.
    """
    known = {name: state_dict[key] for key, name in names.items()}
    _check_unchanged(state, {*known, *_first_names(model, known)})
    _keep_owned(model, state, known)
    state_dict.update({key: known[name] for key, name in names.items()})


def _first_names(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yields the first name of each tensor in the model, where shared ones may be given by any of their names."""
    own = {id(tensor): name for name, tensor in named_tensors(model).items()}
    every = named_tensors(model, aliases=True)
    yield from (own[id(every[name])] for name in names if name in every)


def _forget_base(model: nn.Module, state: ModelState) -> None:
    for adapter in state.adapters.values():
        adapter.base.clear()
    if not any(is_shard(layer, name) for layer in adapted_layers(model).values() for name in layer._parameters):
        for adapter in state.adapters.values():
            adapter.fingerprints.clear()  # of the base that was


def _check_unchanged(state: ModelState, names: Collection[str]) -> None:
    """Refuses a base for adapters whose init has changed the base."""
    for name, adapter in state.adapters.items():
        owned, stored = state.values.of(name), tuple(f"{key}{SUFFIX}." for key in adapter.plan.stored)
        if adapter.plan.init.changes_base and any(key in owned or key.startswith(stored) for key in names):
            raise StateError(
                f"The adapter {name!r} was started by {adapter.plan.init.name!r}, which changed the base; another base "
                "would undo that. Load the base before the adapter is added, or take it off first: unload()."
            )


def _keep_owned(model: nn.Module, state: ModelState, values: dict[str, Any]) -> None:
    """Records new values of heads, biases and statistics for the base, and for adapters that have not changed them yet.

    Adapters that have changed a tensor keep their own value, in place or not.
    """
    named = named_tensors(model, aliases=True)
    owned = state.values
    owned.follow_casts(model)
    for name in owned.base:
        own = own_tensor(model, name)
        aliases = [alias for alias, tensor in named.items() if tensor is own and alias in values]
        fitting = [alias for alias in aliases if values[alias].shape == own.shape]
        if not fitting:
            continue
        new = values[fitting[-1]].detach()  # of a shared tensor the last one counts, as for torch
        base, owner = owned.base_value(model, name), owned.owner.get(name)
        unchanged = [adapter for adapter in state.adapters if _is_unchanged(owned, model, adapter, name, base)]
        for adapter in unchanged:
            if adapter != owner:
                value = owned.values[adapter][name]
                owned.values[adapter][name] = new.to(value.device, value.dtype, copy=True)
        if owner is not None:
            owned.base[name] = new.to(base.device, base.dtype, copy=True)
            if owner not in unchanged:
                values |= dict.fromkeys(fitting, own.detach())


def _is_unchanged(owned: OwnedTensors, model: nn.Module, adapter: str, name: str, base: Tensor) -> bool:
    """Whether an adapter's value of a tensor is still the base's; what is split over processes counts as changed."""
    if name not in owned.of(adapter) or is_shard(*holder_of(model, name)):
        return False
    value = owned.value(model, adapter, name)
    return torch.equal(value.to(base.device, base.dtype), base)
