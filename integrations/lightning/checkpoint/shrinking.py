"""Makes a checkpoint small: without the frozen base, and with what is needed to rebuild the adapters."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lora_plugins import LoraModel
from lora_plugins.adapter import present_state
from lora_plugins.inplace import named_tensors, own_tensor
from lora_plugins.integrations.lightning.checkpoint.adapted_networks import without_networks
from lora_plugins.integrations.lightning.checkpoint.attribute_dicts import with_plain_dicts
from lora_plugins.integrations.lightning.checkpoint.callback_states import without_base_of_callbacks
from lora_plugins.integrations.lightning.checkpoint.entry import FORMAT, KEY
from lora_plugins.integrations.lightning.checkpoint.rebuilding import with_line
from lora_plugins.integrations.lightning.checkpoint.schedulers import without_functions
from lora_plugins.integrations.lightning.checkpoint.state_dicts import StateDict, as_saved, map_state_dicts, state_key
from lora_plugins.integrations.lightning.checkpoint.without_trainer import LoraCheckpointMixin
from lora_plugins.integrations.lightning.module import (
    adapted_targets,
    check_not_replaced,
    frozen_as_built,
    frozen_keys,
    merged_weights,
)
from lora_plugins.utils import plain_name


def shrink(checkpoint: Mapping[str, Any], module: LightningModule, *, whole: bool = False) -> dict[str, Any]:
    """Returns a checkpoint without the frozen base, and with what is needed to rebuild the adapters.

    Of a module without adapters, as after a merge, nothing is left out; nor is the frozen base of a `whole` checkpoint,
    as the module may move parts of that before it is read.

    Raises:
        StateError: If an adapter was merged by hand and not unmerged, or layers that it is on were replaced.
    """
    targets = adapted_targets(module)
    if not targets:
        return dict(checkpoint)
    parts = {} if whole else frozen_as_built(module)
    frozen = frozenset() if whole else frozen_keys(module) | parts.keys()
    left_out: dict[str, None] = {}  # of any of them: the module's own hook may rename the keys of one

    def without_base(state: StateDict) -> StateDict:
        named = {plain_name(key): value for key, value in state.items()}
        left_out.update(dict.fromkeys(key for key in named if key in frozen))
        return {key: value for key, value in named.items() if key not in frozen}

    small = map_state_dicts(without_functions(checkpoint), without_base)
    base = {name: tensor for name, tensor in named_tensors(module, aliases=True).items() if name in left_out}
    small, of_callbacks = without_base_of_callbacks(small, base)
    saved = small.get("state_dict", {})
    adapters = [adapter for path, target in targets.items() for adapter in _adapter_entries(path, target, saved)]
    small, dicts = with_plain_dicts(without_networks(small))
    small, line = (small, {}) if isinstance(module, LoraCheckpointMixin) else with_line(small, module)
    merged = merged_weights(module)
    about = {
        "base": list(merged),
        "base_tensors": {key: own_tensor(module, key).detach() for key in merged if key not in saved},
        "pretrained": {key: values for key, values in merged.items() if values},
        "outside": {key: values for key, values in parts.items() if key in left_out},
        "of_callbacks": of_callbacks,
        "whole": whole,
    }
    about = {key: values for key, values in about.items() if values}
    about["compiled"] = any(key != plain_name(key) for key in checkpoint.get("state_dict", {}))
    return {
        **small,
        KEY: {"format": FORMAT, "left_out": list(left_out), "adapters": adapters, **about, **dicts, **line},
    }


def _adapter_entries(path: str, target: nn.Module, saved: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lora, owner = LoraModel(target), present_state(target).values.owner
    for name in lora.adapters:
        check_not_replaced(target, name)
        packed = lora.pack(name)
        not_in_module = {f"value/{value}" for value in owner if owner[value] != name}
        keys = {key: state_key(path, name, key) for key in packed.tensors if key not in not_in_module}
        yield {
            "target": path,
            "active": name in lora.active_adapters,
            "weight": lora.active_weights.get(name, 1.0),
            "manifest": as_saved(packed.manifest, keys, saved),
            "tensors": {key: tensor for key, tensor in packed.tensors.items() if keys.get(key) not in saved},
        }
