"""The state dicts of a checkpoint, and the keys, types and shapes that the tensors of an adapter have there."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

StateDict = dict[str, Any]


def map_state_dicts(checkpoint: Mapping[str, Any], change: Callable[[StateDict], StateDict]) -> dict[str, Any]:
    """Applies `change` to every state dict of the module that Lightning's own callbacks put into a checkpoint."""
    mapped = dict(checkpoint)
    for key in ("state_dict", "current_model_state"):  # WeightAveraging saves the current weights under the second
        if key in mapped:
            mapped[key] = change(mapped[key])
    if "callbacks" in mapped:
        mapped["callbacks"] = {key: _mapped_callback(state, change) for key, state in mapped["callbacks"].items()}
    return mapped


def with_hidden(own: StateDict, module: nn.Module) -> StateDict:
    """Adds to the state dict of a module what its own method leaves out: averages of the module may have that.

    Its own `load_state_dict` may not know these names.
    """
    return {**nn.Module.state_dict(module), **own}


def state_key(path: str, adapter: str, key: str) -> str:
    """Returns the key that a tensor of a packed adapter has in the module's state dict; "" if it is not there.

    There, `key` is `lora/LAYER/lora_A`, `value/NAME`, or any other.
    """
    kind, _, rest = key.partition("/")
    parts = {"lora": [path, *rest.split("/"), adapter], "value": [path, rest]}.get(kind, [])
    return ".".join(part for part in parts if part)


def as_saved(manifest: Mapping[str, Any], keys: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest with the types and shapes that tensors have in a state dict, where they are there.

    The module may have a shard of a tensor, and an average of it another type. `keys` are those in the state dict, by
    those in the manifest.
    """
    saved = {key: state[own] for key, own in keys.items() if own in state}
    about = {
        key: {**entry, "dtype": str(saved[key].dtype).removeprefix("torch."), "shape": list(saved[key].size())}
        if key in saved
        else entry
        for key, entry in manifest["tensors"].items()
    }
    return {**manifest, "tensors": about}


def _mapped_callback(state: Any, change: Callable[[StateDict], StateDict]) -> Any:
    key = "average_model_state"  # of StochasticWeightAveraging
    if not isinstance(state, dict) or not state.get(key):
        return state
    return {**state, key: change(state[key])}
