"""State dicts that are loaded into a part of an adapted model instead of the model."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from lora_plugins.errors import StateError, listing
from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.inplace.layer_state import state_of
from lora_plugins.utils import loaded_key, path_starts, plain_name

_NOW = {
    "in a block": "inside disable_adapter() or mixed_batch(). Leave the `with` block first.",
    "merged": "while an adapter is merged. Call unmerge_adapter() first.",
}


Accept = Callable[[nn.Module, nn.Module, dict[str, Any], str], None]
"""Completes a state dict of the base of a part, so that the part can load it; takes model, part, state dict and
prefix."""


class _Watch:
    """The hook of a part, which knows the model; a copy of the part alone knows none."""

    def __init__(self, model: "weakref.ref[nn.Module] | None", accept: Accept) -> None:
        self._model, self._accept = model, accept

    def __call__(self, part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Checks a state dict where loading begins, before anything is loaded.

        Raises:
            StateError: If what it loads would be lost, since the model will put its own values back; or if it is one of
                the base, and the model whose heads and biases it may replace is not known.
        """
        begins_here = not plain_name(prefix)  # or in what is inserted around the part
        layers = [state for each in part.modules() if (state := state_of(each))] if begins_here else []
        if not layers or not state_dict:
            return
        where = f"{type(part).__name__} is a part of an adapted model, with {listing(state.name for state in layers)}"
        for state in layers:
            if state.meanwhile:
                raise StateError(f"{where}: nothing can be loaded into it {_NOW[state.meanwhile]}")
        if any(prefix + key in state_dict for key in factors_of(part)):
            return
        model = self._model() if self._model is not None else None
        if model is None or not any(each is part for each in model.modules()):
            raise StateError(
                f"{where}. Load a state dict of the base into the whole model, every key with the part's name before "
                "it: model.load_state_dict({'part.' + key: value, ...}, strict=False)."
            )
        self._accept(model, part, state_dict, prefix)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Watch":
        """Returns the hook of a copy: of the model's copy, if that is what is copied."""
        twin = memo.get(id(self._model() if self._model is not None else None))
        return _Watch(weakref.ref(twin) if isinstance(twin, nn.Module) else None, self._accept)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves the model out of the pickle of a part."""
        return _Watch, (None, self._accept)


def watch_loading(model: nn.Module, accept: Accept) -> None:
    """Lets the parts of a model that have adapted layers load a state dict of their base as the whole model does.

    No other part is touched: a loss among the hyperparameters of a LightningModule, say, is pickled into checkpoints.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    adapted = [name for name, part in parts.items() if state_of(part) is not None]
    for part in {parts[start]: None for name in adapted for start in path_starts(name)}:
        if part is not model and not isinstance(part, ScriptModule) and not _hooks_of(part):
            # By torch's own method: the modules of some packages have another of this name (otx).
            hook = _Watch(weakref.ref(model), accept)
            nn.Module.register_load_state_dict_pre_hook(part, hook)  # type: ignore[no-untyped-call]


def let_load(part: nn.Module) -> None:
    """Undoes `watch_loading` for one part."""
    for key in _hooks_of(part):
        del part._load_state_dict_pre_hooks[key]


def _hooks_of(part: nn.Module) -> list[int]:
    hooks = part._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if isinstance(getattr(hook, "hook", hook), _Watch)]


def factors_of(part: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of adapters in a part, by all keys that they have in its state dict."""
    named = part.named_modules(remove_duplicate=False)
    found = [(name, each) for name, each in named if isinstance(each, AdapterTensors)]
    return {loaded_key(f"{name}.{key}"): tensor for name, each in found for key, tensor in each.state_dict().items()}
