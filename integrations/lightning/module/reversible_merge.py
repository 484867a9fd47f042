"""Merging the adapters of a trained module into plain weights, in a way that can be taken back exactly."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from lora_plugins import LoraModel, StateError
from lora_plugins.adapter.state import adapted_layers, base_in_place, model_state
from lora_plugins.errors import listing
from lora_plugins.files.folder import PackedAdapter, replace_file
from lora_plugins.inplace.layer import layer_state, weight_names
from lora_plugins.inplace.modules import full_name, own_tensor


@dataclass(frozen=True)
class Merged:
    """A module whose adapters are merged into plain layers, and what it takes to have them back.

    Args:
        target: The module.
        layers: The layers that were adapted, by name.
        base: The untouched value of every tensor that merging or training in place changed, by full name.
        adapters: The adapters, in the order in which they were added.
        active: Names of the active ones.
    """

    target: "weakref.ref[nn.Module]"
    layers: "dict[str, weakref.ref[nn.Module]]"
    base: dict[str, Tensor]
    adapters: dict[str, PackedAdapter]
    active: tuple[str, ...]

    def fits(self, target: nn.Module) -> bool:
        """Whether `target` is the merged module, with its layers still in place."""
        if self.target() is not target or model_state(target) is not None:
            return False
        found = dict(target.named_modules())
        return all(found.get(name) is layer() for name, layer in self.layers.items())

    def put_back(self) -> None:
        """Gives the module its untouched weights and its adapters again, bit for bit."""
        target = self.target()
        assert target is not None
        for name, value in self.base.items():
            tensor = own_tensor(target, name)
            tensor.data = value.to(tensor.device)
        for name, packed in self.adapters.items():
            lora = LoraModel.load_packed(target, packed, name)
        if lora.active_adapters != self.active:
            lora.set_adapter(self.active)


def merge(target: nn.Module) -> Merged:
    """Merges the active adapters of a module into plain layers with their own classes and keys.

    The untouched weights are kept in memory, one copy of each that an adapter updates.

    Raises:
        MergeError: If rounding would lose too much of an update. The module is untouched.
        StateError: If a weight is computed by a parametrization, which merging replaces for good.
    """
    lora = LoraModel(target)
    state = model_state(target)
    assert state is not None
    refuse_computed(target)
    layers = adapted_layers(target)
    adapters = {name: lora.pack(name) for name in lora.adapters}
    active = lora.active_adapters
    weights = {
        full_name(layer, tensor)
        for plan in lora.plans.values()
        for layer, tensors in plan.weights().items()
        for tensor in tensors
    }
    with base_in_place(target, state):
        base = {name: own_tensor(target, name).data for name in sorted(weights | set(state.values.base))}
    # In-place values of the adapters live on in `adapters`, so the merged module may keep its tensors.
    adapters = {name: _detached(packed) for name, packed in adapters.items()}
    lora.merge_adapter()  # all of it or nothing, since the untouched weights are kept anyway
    lora.merge_and_unload()
    return Merged(
        weakref.ref(target), {name: weakref.ref(layer) for name, layer in layers.items()}, base, adapters, active
    )


def refuse_computed(target: nn.Module) -> None:
    """Refuses to merge into weights that are no parameters of their layer, but computed from others.

    Raises:
        StateError: If there are any, naming their layers.
    """
    computed = [
        name
        for name, layer in adapted_layers(target).items()
        if any(weight not in layer._parameters for weight in weight_names(layer_state(layer)))
    ]
    if computed:
        raise StateError(
            f"The weights of {listing(computed)} are computed from other tensors, by weight norm, a parametrization or "
            "pruning. Merging replaces that for good, which fit cannot take back: set merge_on_fit_end=False and "
            "export_to=None, and call LoraModel(module).merge_and_unload() when all is done."
        )


@contextmanager
def merged(target: nn.Module) -> Iterator[Merged]:
    """Merges for the time of a `with` block."""
    result = merge(target)
    try:
        yield result
    finally:
        result.put_back()


def plain_state_dict(target: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a plain module with no two tensors sharing memory, as safetensors wants it."""
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in target.state_dict().items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Writes tensors so that a killed process leaves the old file or the new one; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return path


def _detached(packed: PackedAdapter) -> PackedAdapter:
    """Copies what the merged module goes on using: heads, biases and statistics."""
    values = {key: t.clone() if key.startswith("value/") else t for key, t in packed.tensors.items()}
    return PackedAdapter(packed.manifest, values)
