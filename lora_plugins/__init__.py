"""LoRA for vision models as a set of plugins.

Three lines adapt a model in place:

    lora = LoraModel(model, LoraConfig(r=8, target_modules=["attn.qkv"]))
    ...  # train `model` as ever: only the adapter requires gradients
    lora.merge_and_unload()

A plugin is a module named by an entry point of the group `lora_plugins`, with functions marked by `hookimpl` that
register layer types (`LayerPlugin`) or inits (`InitPlugin`); see `lora_plugins.plugins.hookspecs`.
"""

from lora_plugins.adapter.calibration import InitData, Observations, observe
from lora_plugins.config import LoraConfig
from lora_plugins.errors import (
    AdapterFileError,
    ConfigError,
    LoraError,
    MergeError,
    PluginError,
    StateError,
    TargetError,
)
from lora_plugins.model import LoraModel
from lora_plugins.plan.plan import Plan
from lora_plugins.plugins.hookspecs import hookimpl
from lora_plugins.plugins.init import InitContext, InitPlugin, InputMoments, Observed, RankRequest
from lora_plugins.plugins.layer import ColumnMajorPlugin, LayerPlugin, RowMajorPlugin, Slot, Term
from lora_plugins.plugins.registrars import InitRegistrar, LayerRegistrar
from lora_plugins.plugins.variant import VariantPlugin

__all__ = [
    "AdapterFileError",
    "ColumnMajorPlugin",
    "ConfigError",
    "InitContext",
    "InitData",
    "InitPlugin",
    "InitRegistrar",
    "InputMoments",
    "LayerPlugin",
    "LayerRegistrar",
    "LoraConfig",
    "LoraError",
    "LoraModel",
    "MergeError",
    "Observations",
    "Observed",
    "Plan",
    "PluginError",
    "RankRequest",
    "RowMajorPlugin",
    "Slot",
    "StateError",
    "TargetError",
    "Term",
    "VariantPlugin",
    "hookimpl",
    "observe",
]
