"""The adapters of a module as a merge leaves them behind: enough to put each of them on again."""

from dataclasses import dataclass

from torch import Tensor, nn

from lora_plugins import LoraModel
from lora_plugins.adapter import ModelState, present_state
from lora_plugins.files import PackedAdapter
from lora_plugins.inplace import own_tensor

Fingerprints = dict[str, dict[str, float]]
"""Of weights, by full name."""


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter of a module that was merged.

    Args:
        packed: The adapter, as one of the raw weights that were there.
        changed: The weights that its init has changed, by full name. They cannot be computed again from a base that was
            cast since.
        kept: The fingerprints that its files have whatever the weights are now.
    """

    packed: PackedAdapter
    changed: dict[str, Tensor]
    kept: Fingerprints

    def put(self, target: nn.Module, name: str) -> LoraModel:
        """Puts the adapter on a module that has the raw weights again."""
        changed = {key: value.to(own_tensor(target, key).device) for key, value in self.changed.items()}
        lora = LoraModel.load_packed(target, self.packed, name, changed=changed)
        present_state(target).adapters[name].kept.update(self.kept)
        return lora


def adapters_to_merge(target: nn.Module) -> dict[str, MergedAdapter]:
    """Returns the adapters of a module, in the order in which they were added."""
    lora, state = LoraModel(target), present_state(target)
    for adapter in state.adapters.values():
        adapter.fingerprints.clear()  # of what was written past autograd (`weight.data`) in the meantime
    return {name: _merged_adapter(lora, state, name) for name in state.adapters}


def _merged_adapter(lora: LoraModel, state: ModelState, name: str) -> MergedAdapter:
    packed, adapter = lora.pack(name), state.adapters[name]
    base = {key: values for key, (_, values) in adapter.fingerprints.items()}
    # The merged module goes on with heads, biases and statistics, which the adapter has to keep as they are.
    tensors = {key: tensor.clone() if key.startswith("value/") else tensor for key, tensor in packed.tensors.items()}
    keys = state.values.of(name).keys() - adapter.plan.saved_in_place
    changed = {key: state.values.value(lora.model, name, key) for key in sorted(keys)}
    return MergedAdapter(PackedAdapter({**packed.manifest, "base": base}, tensors), changed, dict(adapter.kept))
