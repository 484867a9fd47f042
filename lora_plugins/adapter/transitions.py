"""The operations that change the adapters of a model, except merging: each happens as a whole or not at all.

`lifecycle` says which call is allowed when.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from lora_plugins.adapter.acting import apply_state
from lora_plugins.adapter.attach import attach, detach
from lora_plugins.adapter.base_state_dict import accept_base_of_part
from lora_plugins.adapter.content import NewAdapter, trained_values, with_own_tensors
from lora_plugins.adapter.group_offloading import check_no_copies
from lora_plugins.adapter.lifecycle import CALLS
from lora_plugins.adapter.moved_base import base_marks
from lora_plugins.adapter.new_bases import changed_bases, new_stored_weights, to_store
from lora_plugins.adapter.opening import close_state, open_state
from lora_plugins.adapter.same_start import check_rounded
from lora_plugins.adapter.sharing import by_layer, check_shared
from lora_plugins.adapter.state import Adapter, ModelState, adapted_layers, model_state, present_state
from lora_plugins.arguments import weighted
from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, StateError, TargetError, counted, listing
from lora_plugins.inplace import (
    RESERVED,
    all_stored,
    holder_of,
    layer_state,
    make_dense,
    model_modules,
    own_tensor,
    put_stored,
    strip_adapters,
    unwrapped,
    watch_loading,
)
from lora_plugins.utils import without_collection

ADAPTER_NAME = re.compile(r"\w[\w-]*")
"""What an adapter can be called."""


def check_new(state: ModelState | None, adapter: str) -> None:
    """Checks that an adapter of that name can be added to a model, which may have none yet.

    Raises:
        ConfigError: If the name is taken, or cannot name an adapter.
        StateError: If something is merged.
    """
    if not ADAPTER_NAME.fullmatch(adapter):
        raise ConfigError(f"{adapter!r} cannot name an adapter: use letters, digits, '_' and '-'.")
    if adapter in RESERVED:
        raise ConfigError(f"{adapter!r} cannot name an adapter: every module has an attribute of that name.")
    if state is None:
        return
    state.check("add_adapter")
    if adapter in state.adapters:
        raise ConfigError(
            f"The model has an adapter {adapter!r} already, as where a cell of a notebook is run again. Delete it, "
            f"LoraModel(model).delete_adapter({adapter!r}), or choose another adapter_name."
        )


def check_same(state: ModelState, adapter: str, config: LoraConfig) -> None:
    """Checks that an adapter which is to be trained on has the configuration that is asked for.

    Raises:
        StateError: If it has another, naming the fields that differ.
    """
    present = state.adapters[adapter].plan.config
    fields = [each.name for each in dataclasses.fields(config)]
    different = [name for name in fields if getattr(config, name) != getattr(present, name)]
    if different:
        raise StateError(
            f"The model has an adapter {adapter!r} already, with another configuration: {listing(different)} differ. "
            "Choose another adapter_name, or take the present one off first: LoraModel(model).unload()."
        )


def check_names(state: ModelState, adapters: Sequence[str]) -> None:
    """Checks that all adapters are there, and each is named once.

    Raises:
        ConfigError: If a name is repeated: its update would count twice.
        StateError: If there is no adapter of a name.
    """
    for name in adapters:
        state.adapter(name)
    repeated = sorted({name for name in adapters if list(adapters).count(name) > 1})
    if repeated:
        raise ConfigError(f"{listing(repeated)} is named more than once; name each adapter once.")


def add(model: nn.Module, adapter: str, new: NewAdapter) -> None:
    """Puts a new adapter on a model, under a name; everything that can fail happens before the first change.

    Raises:
        MergeError: If its init or its storage would change a weight that a layer uses too which it does not adapt.
        TargetError: If it would store a weight of which another adapter has a value of its own, or its init makes
            weights larger than their types can hold.
        StateError: If diffusers takes the model's tensors from copies, which lack those of the adapter.
    """
    check_no_copies(model_modules(model), CALLS["add_adapter"].doing)
    plan, content, stored, changed = new.plan, new.content, new.stored, new.changed
    if plan.init.changes_base:
        check_shared(model, plan.weights())
    if names := to_store(model, plan):
        check_shared(model, by_layer(names), to="store")
        check_not_owned(model, names)
    if stored is None:
        stored = new_stored_weights(model, plan, content)
    if changed is None:
        changed = changed_bases(model, plan, content)
        check_rounded(model, plan, changed, stored)
        content = with_own_tensors(model, plan, content, changed, stored)
    own = trained_values(model, plan)
    # A saved value takes the type that training has on this model, which may be another than where it was saved.
    own |= {key: value.to(own[key].dtype, copy=True) for key, value in new.values.items()} | dict(changed)
    base = base_marks(model, plan)
    state = open_state(model)
    first = not state.adapters
    for name, weight in stored.items():
        if name in state.requires_grad:  # another adapter has frozen the float weight
            weight.was_trained = state.requires_grad[name]
        put_stored(*holder_of(model, name), weight)
    with without_collection():
        attach(model, plan, adapter, content)
    watch_loading(unwrapped(model), accept_base_of_part)
    recipes = {key: dict(tensors.recipe) for key, tensors in content.items()}
    state.adapters[adapter] = Adapter(plan, recipes, base=base)
    state.values.claim(model, adapter, own)
    if first:
        state.active = (adapter,)
    apply_state(model, state)


def check_not_owned(model: nn.Module, weights: Iterable[str]) -> None:
    """Checks that no adapter has a value of its own of weights that are about to be stored, by their full names.

    Raises:
        TargetError: If one has, naming both: its float value would have no place any more.
    """
    state = model_state(model)
    if state is None:
        return
    places = {id(own_tensor(model, name)): name for name in weights}
    for adapter in state.adapters:
        for name in state.values.of(adapter):
            if found := places.get(id(own_tensor(model, name))):
                raise TargetError(
                    f"{found!r} cannot be stored in fewer bytes: the adapter {adapter!r} trains it in full "
                    "(modules_to_save) or changed it. Quantize with the first adapter, or exclude the layer."
                )


def unload(model: nn.Module, dequantize: bool | None) -> None:
    """Takes all adapters off a model whose weights hold no merged update; stored ones stay by default, with a warning.

    Raises:
        StateError: If it has none any more, nor stored weights that are to become dense.
    """
    stored = dict.fromkeys(weight for _, _, weight in all_stored(model))
    state = model_state(model) if stored and dequantize else present_state(model)
    if state is not None:
        strip(model, state)
    if dequantize:
        make_dense(model)
    elif stored and dequantize is None:
        kinds = listing(dict.fromkeys(weight.storage.plugin.name for weight in stored))
        warnings.warn(
            f"{counted(len(stored), 'weight stays', 'weights stay')} stored as {kinds}: their float values were not "
            "kept. Say unload(dequantize=True) for a float model with the dense values, or dequantize=False for this "
            "one.",
            stacklevel=6,
        )


def set_active(
    model: nn.Module,
    state: ModelState,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    *,
    trainable: bool,
) -> None:
    """Makes adapters active, and no other.

    Raises:
        ConfigError: If a name is repeated, or the weights are not one finite number for each.
        StateError: If a name is unknown, something is merged, two adapters have a value of one tensor, or one that has
            values of its own is to be weighted.
    """
    state.check("set_adapter")
    check_names(state, adapters)
    state.values.check(adapters)
    _check_dropout(model, adapters)
    given = _weights(state, adapters, weights)
    state.active, state.weights, state.trainable = tuple(adapters), given, trainable
    apply_state(model, state)


def _weights(state: ModelState, adapters: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """Returns the weights that are not 1, by adapter."""
    if weights is None:
        return {}
    given = {name: weight for name, weight in weighted(adapters, weights) if weight != 1}
    for name in given:
        if own := state.values.of(name):
            raise StateError(
                f"The adapter {name!r} has its own value of {listing(own)}, which cannot be weighted. Give it the "
                "weight 1."
            )
    return given


def _check_dropout(model: nn.Module, adapters: Sequence[str]) -> None:
    """Checks that the dropout of an adapter can act where another one is active."""
    for name, layer in adapted_layers(model).items():
        planned = [layer_state(layer).adapters[each] for each in adapters if each in layer_state(layer).adapters]
        if any(each.settings.dropout for each in planned) and any(each.branch_use == "never" for each in planned):
            raise StateError(
                f"The adapters {listing(adapters)} cannot be active together: one has dropout on {name!r}, where "
                "another one needs the effective weight, on which dropout cannot act. Set dropout=0."
            )


def delete(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Removes an adapter; the last one leaves the untouched model.

    Raises:
        StateError: If there is no such adapter, or something is merged.
    """
    state.adapter(adapter)
    state.check("delete_adapter")
    if len(state.adapters) == 1:
        strip(model, state)
        return
    state.active = tuple(name for name in state.active if name != adapter)
    state.weights = {name: weight for name, weight in state.weights.items() if name != adapter}
    apply_state(model, state)
    state.values.release(adapter)
    for layer in adapted_layers(model).values():
        if adapter in layer_state(layer).adapters:
            detach(layer, adapter)
    del state.adapters[adapter]
    apply_state(model, state)  # the norms that the others freeze


def strip(model: nn.Module, state: ModelState) -> None:
    """Takes all adapters off a model whose weights hold no merged update: the untouched model, bit for bit."""
    state.active = ()
    state.values.forget_replaced(model)
    apply_state(model, state)
    for layer in adapted_layers(model).values():
        strip_adapters(layer)
    close_state(model)
