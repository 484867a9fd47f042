"""What training has changed in a model beside an adapter: its files do not hold it."""

import warnings

from torch import nn

from lora_plugins.adapter.moved_base import moved_base
from lora_plugins.adapter.state import ModelState
from lora_plugins.errors import listing
from lora_plugins.inplace import model_modules, own_tensors

_STACKLEVEL = 7
"""Of the line that calls `LoraModel.save_adapter`, behind its decorators."""


def warn_of_unsaved(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Warns of parameters that are trained and belong to no adapter, and of tensors that something else has changed.

    Args:
        model: The model.
        state: Its adapters.
        adapter: Name of the adapter that is about to be saved.
    """
    besides = _trained_besides(model, state)
    if besides:
        warnings.warn(
            f"{listing(besides, 3)} require a gradient and are no part of an adapter, so what was trained of them "
            "is not saved here, and the adapter may not load onto the base again. Name their modules in "
            "modules_to_save, and keep other code from unfreezing the rest; to keep this training, save the state "
            "dict, or merge.",
            stacklevel=_STACKLEVEL,
        )
    if moved := [name for name in moved_base(model, state, adapter) if name not in besides]:
        warnings.warn(
            f"The adapter does not hold {listing(moved, 3)}, which have changed since it was added: on the base as "
            "it was, it computes something else. Codebooks, queues and the like, which layers update themselves, "
            "belong into modules_to_save. Frozen weights that something wrote into are saved by the state dict, or "
            "by merging.",
            stacklevel=_STACKLEVEL,
        )


def _trained_besides(model: nn.Module, state: ModelState) -> list[str]:
    """Returns the names of parameters that require a gradient and belong to no adapter."""
    held = {name for adapter in state.adapters.values() for name in adapter.plan.trained}
    own = own_tensors(model_modules(model), "_parameters")
    return [name for name, parameter in own.items() if parameter.requires_grad and name not in held]
