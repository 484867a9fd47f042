"""Merges the adapters of a trained module into plain weights in a way that can be undone exactly."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins import LoraModel, StateError
from lora_plugins.adapter import adapted_layers, adapter_tensors, base_in_place, model_state, present_state, whole
from lora_plugins.errors import listing
from lora_plugins.files import fingerprint
from lora_plugins.inplace import (
    AdapterTensors,
    LibraryWeight,
    StoredWeight,
    can_be_plain,
    full_name,
    holder_of,
    layer_state,
    library_weights,
    named_tensors,
    of_all_modules,
    own_tensor,
    put_marks,
    put_stored,
    quantizer_marks,
    stored_weights,
)
from lora_plugins.integrations.lightning.module.bitwise import checksum, checksums
from lora_plugins.integrations.lightning.module.merged_adapters import MergedAdapter, adapters_to_merge
from lora_plugins.integrations.lightning.module.merged_base import (
    MergeMarks,
    mark_merged,
    merge_marks,
    merged_weights,
    set_merge_marks,
)
from lora_plugins.integrations.lightning.module.weight_norm import normed_weights, sources, unload_with_norms
from lora_plugins.merge import DEFAULT_MAX_ERROR, check_merge_later
from lora_plugins.plan import Plan
from lora_plugins.utils import ending


@dataclass(frozen=True)
class ReversibleMerge:
    """A module whose adapters are merged into plain layers, and what is needed to restore them.

    Args:
        base: The raw value of every tensor that merging or training in place changed, by full name.
        stored: The weights that were stored in fewer bytes, by full name.
        foreign: Those that another library quantized, likewise.
        quantizers: What models of transformers and diffusers recorded about that.
        adapters: The adapters by name, in the order in which they were added.
        active: The active ones by name, with what their updates are multiplied by.
        merged: The checksum of each of these tensors after the merge, by full name.
        target: The module.
        marks: Which weights were merged ones before.
        parameters: A and B of the target by full name, for an optimizer that outlives the fit and has them.
    """

    base: dict[str, Tensor]
    stored: dict[str, StoredWeight]
    foreign: dict[str, LibraryWeight]
    quantizers: dict[str, Any]
    adapters: dict[str, MergedAdapter]
    active: dict[str, float]
    merged: dict[str, int]
    target: "weakref.ref[nn.Module]"
    marks: MergeMarks
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def replaced(self, target: nn.Module) -> list[str]:
        """Returns the names of merged tensors that are not in `target`, or no longer have the merged values."""
        own = named_tensors(target, aliases=True)
        return [
            name
            for name, merged in self.merged.items()
            if name not in own or own[name].shape != self._shape(name) or checksum(own[name]) != merged
        ]

    def _shape(self, name: str) -> torch.Size:
        return next(kind[name].shape for kind in (self.base, self.stored, self.foreign) if name in kind)

    def is_of(self, target: nn.Module) -> bool:
        """Whether a plain module has exactly the values of the merge: it is the one that was merged, or a copy."""
        # Where nothing was learned, an untouched module has these values too, and no adapter to go on with.
        return not self.replaced(target) and (self.target() is target or self.merged != checksums(self.base))

    def undo(self, target: nn.Module) -> None:
        """Restores the raw weights and the adapters of a module with the merged values, bit for bit.

        Where that does not come to its end, the module is the merged one.
        """
        whole(target, lambda: self._undo(target))

    def _undo(self, target: nn.Module) -> None:
        for name, value in self.base.items():
            tensor = own_tensor(target, name)
            tensor.data = value.to(tensor.device)
        for name, weight in self.stored.items():
            layer, key = holder_of(target, name)
            put_stored(layer, key, weight.to(own_tensor(target, name).device))
        for name, quantized in self.foreign.items():
            quantized.put(*holder_of(target, name))
        put_marks(target, self.quantizers)
        for name, adapter in self.adapters.items():
            lora = adapter.put(target, name)
        if lora.active_weights != self.active:
            lora.set_adapter([*self.active], weights=[*self.active.values()])
        set_merge_marks(target, self.marks)
        if self.target() is target:
            self._put_parameters(target)

    def _put_parameters(self, target: nn.Module) -> None:
        """Puts the parameters that were there in place of those that were made of their values."""
        for name, made in adapter_tensors(target).items():
            own = self.parameters.get(name)
            if own is None or not _takes_data(own, made):
                continue
            own.requires_grad_(made.requires_grad)
            holder, key = holder_of(target, name)
            cast(AdapterTensors, holder)[key] = own


def merge_reversibly(
    target: nn.Module,
    max_error: float = DEFAULT_MAX_ERROR,
    *,
    dequantize: bool,
    base_sums: Mapping[str, int] = MappingProxyType({}),
) -> ReversibleMerge:
    """Merges the active adapters of a module into plain layers with their own classes and keys.

    The raw weights stay in memory, one copy of each that an adapter changes. `base_sums` are their checksums by full
    name, as far as they are known. `max_error` is the share of an update that rounding may lose; with `dequantize`,
    stored weights become dense.

    Raises:
        MergeError: If rounding would lose too much of a delta weight. The module is unchanged.
        StateError: If a weight is computed by a parametrization, which merging would replace permanently; or
            stored in fewer bytes, and is not to become dense.
    """
    check_mergeable(target, dequantize=dequantize)
    return whole(target, lambda: _merge(target, max_error, dequantize, base_sums))


def _merge(target: nn.Module, max_error: float, dequantize: bool, base_sums: Mapping[str, int]) -> ReversibleMerge:
    lora, state, normed = LoraModel(target), present_state(target), normed_weights(target)
    adapters, parameters, active = adapters_to_merge(target), adapter_tensors(target), lora.active_weights
    effective = {
        full_name(layer, tensor): (layer, tensor)
        for plan in lora.plans.values()
        for layer, tensors in plan.weights().items()
        for tensor in tensors
    }
    weights = {source for name in effective for source in sources(name, normed)}
    stored = of_all_modules(target, stored_weights)
    foreign = of_all_modules(target, library_weights) if dequantize else {}
    quantizers = quantizer_marks(target)
    changed = sorted((weights | set(state.values.base)) - stored.keys() - foreign.keys())
    with base_in_place(target, state):
        base = {name: own_tensor(target, name).data for name in changed}
        pretrained = _pretrained(
            target, adapters, {name: base[name] for each in normed for name in sources(each, normed)}
        )
    before = {name: base_sums[name] if name in base_sums else checksum(value) for name, value in base.items()}
    before |= {name: checksum(weight.dense()) for kind in (stored, foreign) for name, weight in kind.items()}
    lora.merge_adapter(max_error=max_error)
    if normed:
        unload_with_norms(lora, effective, normed, state.values.base)
    else:
        lora.merge_and_unload(dequantize=dequantize)
    merged, marks = checksums({name: own_tensor(target, name) for name in before}), merge_marks(target)
    mark_merged(target, {name: pretrained.get(name, {}) for name in sorted(before) if merged[name] != before[name]})
    return ReversibleMerge(
        base, stored, foreign, quantizers, adapters, active, merged, weakref.ref(target), marks, parameters
    )


def _pretrained(
    target: nn.Module, adapters: Mapping[str, MergedAdapter], normed: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Returns the fingerprints of pretrained weights, by name; those of `normed` are taken now."""
    known = [values for each in adapters.values() for values in (each.packed.manifest["base"], each.kept)]
    found = {name: values for own in known for name, values in own.items()}
    found |= {name: fingerprint(tensor) for name, tensor in normed.items()}
    return found | merged_weights(target)  # an earlier merge has them from before it


def check_mergeable(target: nn.Module, *, dequantize: bool, plan: Plan | None = None) -> None:
    """Checks that every adapted weight is a parameter of adapted layers alone, or becomes one.

    `plan` is what is about to be adapted, if it is not yet.

    Raises:
        StateError: If some are buffers, computed from other tensors, or stored, naming them or their layers.
        MergeError: If a layer that is not adapted has one of them too.
    """
    otherwise = "merge_on_fit_end=False and export_to=None"
    stored = check_merge_later(target, dequantize=dequantize, otherwise=otherwise, plan=plan)
    normed = normed_weights(target)
    computed = {
        full_name(name, weight): (name, can_be_plain(layer, weight))
        for name, layer in adapted_layers(target).items()
        for weight in set(layer_state(layer).weight_names) - _parameter_names(layer) - stored_weights(layer).keys()
        if full_name(name, weight) not in normed or stored
    }
    unknown = [weight for weight, (_, is_known) in computed.items() if not is_known]
    if unknown:
        raise StateError(
            f"{listing(unknown)}: not a parameter, but a buffer, or computed in an unknown way, so that nothing can be "
            "merged into it for good. Make it a parameter first, add its layer to exclude_modules, or keep the adapter "
            "beside the base: set merge_on_fit_end=False and export_to=None."
        )
    if computed:
        raise StateError(
            f"The weights of {listing(dict(computed.values()))} are computed from other tensors, by spectral norm, "
            "another parametrization or pruning. Merging replaces that for good, which fit cannot take back: set "
            "merge_on_fit_end=False and export_to=None, and call LoraModel(module).merge_and_unload() when all is done."
        )


@contextmanager
def temporarily_merged(target: nn.Module, max_error: float, *, dequantize: bool) -> Iterator[ReversibleMerge]:
    """Merges inside a `with` block."""
    merges: list[ReversibleMerge] = []

    def undo() -> None:
        if merges and model_state(target) is None:
            merges[0].undo(target)

    with ending(undo):
        merges.append(merge_reversibly(target, max_error, dequantize=dequantize))
        yield merges[0]


def _takes_data(parameter: nn.Parameter, made: Tensor) -> bool:
    """Gives a parameter the values of another one; False between kinds of devices where modules make new ones too."""
    try:
        parameter.data, parameter.grad = made.data, None
    except RuntimeError:
        return False
    return True


def _parameter_names(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters(recurse=False, remove_duplicate=False)}
