"""The state dicts of a checkpoint, and the keys and shapes that the tensors of an adapter have there."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_plugins.utils import plain_name

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


def state_key(path: str, adapter: str, key: str) -> str:
    """Returns the key that a tensor of a packed adapter has in the module's state dict; "" if it is not there.

    Args:
        path: The adapter's target.
        adapter: The adapter's name.
        key: `lora/LAYER/lora_A`, `value/NAME`, or any other.
    """
    kind, _, rest = key.partition("/")
    parts = {"lora": [path, *rest.split("/"), adapter], "value": [path, rest]}.get(kind, [])
    return ".".join(plain_name(part) for part in parts if part)


def whole_shapes(keys: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns the shapes of tensors by their key in a packed adapter, as far as a state dict has them."""
    return {key: list(state[own].size()) for key, own in keys.items() if own in state}


def with_shapes(manifest: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Returns a manifest with the shapes of whole tensors, where it was made of shards."""
    about = {key: {**entry, "shape": shapes.get(key, entry["shape"])} for key, entry in manifest["tensors"].items()}
    return {**manifest, "tensors": about}


def _mapped_callback(state: Any, change: Callable[[StateDict], StateDict]) -> Any:
    key = "average_model_state"  # of StochasticWeightAveraging
    if not isinstance(state, dict) or not state.get(key):
        return state
    return {**state, key: change(state[key])}
