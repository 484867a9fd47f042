"""State dicts that are loaded into a part of an adapted model, past the model itself."""

from typing import Any

from torch import nn
from torch.jit import ScriptModule

from lora_plugins.errors import StateError, listing
from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.inplace.layer_state import state_of

_NOW = {
    "in a block": "inside disable_adapter() or mixed_batch(). Leave the `with` block first.",
    "merged": "while an adapter is merged. Call unmerge_adapter() first.",
}


def watch_loading(part: nn.Module) -> None:
    """Refuses, from now on, state dicts that only the whole model can take."""
    if isinstance(part, ScriptModule):  # which has no hooks, and is never adapted
        return
    part.register_load_state_dict_pre_hook(_check)  # type: ignore[no-untyped-call]


def let_load(part: nn.Module) -> None:
    """Takes back what `watch_loading` did."""
    hooks = part._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is _check:
            del hooks[key]


def _check(part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checks a state dict where loading begins, before anything is loaded.

    Raises:
        StateError: If it is one of the base, whose heads and biases only the model tells from those of adapters, or if
            what it loads would be lost, since the model will put its own values back.
    """
    layers = {} if prefix else {name: state for name, each in part.named_modules() if (state := state_of(each))}
    if not layers or not state_dict:
        return
    where = f"{type(part).__name__} is a part of an adapted model, with {listing(s.name for s in layers.values())}"
    for state in layers.values():
        if state.meanwhile:
            raise StateError(f"{where}: nothing can be loaded into it {_NOW[state.meanwhile]}")
    containers = [name for name, each in part.named_modules() if isinstance(each, AdapterTensors)]
    if not any(key.startswith(f"{name}.") for name in containers for key in state_dict):
        raise StateError(
            f"{where}. Load a state dict of the base into the whole model, every key with the part's name before it: "
            "model.load_state_dict({'part.' + key: value, ...}, strict=False)."
        )
