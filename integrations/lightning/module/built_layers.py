"""A module with the layers that its hooks build, before there is a Trainer."""

import copy

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins.utils import own_randomness

BUILDING_HOOKS = ("setup", "configure_model")
"""The hooks of a LightningModule in which layers are built."""


def with_built_layers(module: LightningModule) -> LightningModule:
    """Returns a module as `fit` adapts it: the module itself, or a copy with its `setup` and `configure_model` called.

    Where they cannot be called without a Trainer, a warning says what is missing, and the module is returned as it is.
    """
    hooks = [hook for hook in BUILDING_HOOKS if is_overridden(hook, module)]
    if not hooks:
        return module
    try:
        with own_randomness(0):
            other = copy.deepcopy(module)
            for hook in hooks:
                getattr(other, hook)(*(["fit"] if hook == "setup" else []))
    except Exception as error:  # of the author's code, which may need the data or a Trainer
        rank_zero_warn(
            f"{' and '.join(hooks)} of {type(module).__name__} cannot be called without a Trainer "
            f"({type(error).__name__}: {error}). Layers that are built there are not in the plan; fit prints it whole."
        )
        return module
    return other
