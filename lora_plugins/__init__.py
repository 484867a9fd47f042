"""LoRA for vision models as a set of plugins.

Three lines adapt a model in place:

    lora = LoraModel(model, LoraConfig(r=8, target_modules=["attn.qkv"]))
    ...  # train `model` as ever: only the adapter requires gradients
    lora.merge_and_unload()

A plugin is a module named by an entry point of the group `lora_plugins`, with functions marked by `hookimpl` that
register layer types (`LayerPlugin`), inits (`InitPlugin`), variants (`VariantPlugin`), formats (`AdapterFormat`) or
storages of weights (`StoragePlugin`); see `lora_plugins.plugins.hookspecs`.

Names are imported when they are first used: a command that only shows its help need not wait for torch.
"""

from typing import TYPE_CHECKING

from lora_plugins.lazy import lazily
from lora_plugins.words import FUNCTIONS

if TYPE_CHECKING:
    from lora_plugins.adapter import Calibration, InitData, calibrate
    from lora_plugins.config import LayerSettings, LoraConfig
    from lora_plugins.errors import (
        AdapterFileError,
        ConfigError,
        LoraError,
        MergeError,
        PluginError,
        StateError,
        TargetError,
    )
    from lora_plugins.files import PackedAdapter, load_quantized
    from lora_plugins.merge import MergedWeight, MergeReport
    from lora_plugins.model import LoraModel
    from lora_plugins.plan import LayerGroup, LeftOut, Plan
    from lora_plugins.plugins import (
        FORMATS,
        INITS,
        LAYERS,
        STORAGES,
        VARIANTS,
        AdapterFormat,
        AdapterSummary,
        ColumnMajorPlugin,
        FormatRegistrar,
        InitContext,
        InitPlugin,
        InitRegistrar,
        InputMoments,
        LayerPlugin,
        LayerRegistrar,
        LayerSummary,
        Owned,
        PlannedLayer,
        PluginInfo,
        PluginKind,
        RankRequest,
        Registry,
        Rescaling,
        RowMajorPlugin,
        Slot,
        SlotCalibration,
        StackedAdapters,
        Storage,
        StoragePlugin,
        StorageRegistrar,
        Term,
        Tie,
        VariantPlugin,
        VariantRegistrar,
        build_registry,
        hookimpl,
    )

__all__ = [
    "FORMATS",
    "INITS",
    "LAYERS",
    "STORAGES",
    "VARIANTS",
    "AdapterFileError",
    "AdapterFormat",
    "AdapterSummary",
    "Calibration",
    "ColumnMajorPlugin",
    "ConfigError",
    "FormatRegistrar",
    "InitContext",
    "InitData",
    "InitPlugin",
    "InitRegistrar",
    "InputMoments",
    "LayerGroup",
    "LayerPlugin",
    "LayerRegistrar",
    "LayerSettings",
    "LayerSummary",
    "LeftOut",
    "LoraConfig",
    "LoraError",
    "LoraModel",
    "MergeError",
    "MergeReport",
    "MergedWeight",
    "Owned",
    "PackedAdapter",
    "Plan",
    "PlannedLayer",
    "PluginError",
    "PluginInfo",
    "PluginKind",
    "RankRequest",
    "Registry",
    "Rescaling",
    "RowMajorPlugin",
    "Slot",
    "SlotCalibration",
    "StackedAdapters",
    "StateError",
    "Storage",
    "StoragePlugin",
    "StorageRegistrar",
    "TargetError",
    "Term",
    "Tie",
    "VariantPlugin",
    "VariantRegistrar",
    "build_registry",
    "calibrate",
    "hookimpl",
    "load_quantized",
]

_ROOMS = {
    "FORMATS": "plugins",
    "INITS": "plugins",
    "LAYERS": "plugins",
    "STORAGES": "plugins",
    "VARIANTS": "plugins",
    "AdapterFileError": "errors",
    "AdapterFormat": "plugins",
    "AdapterSummary": "plugins",
    "Calibration": "adapter",
    "ColumnMajorPlugin": "plugins",
    "ConfigError": "errors",
    "FormatRegistrar": "plugins",
    "InitContext": "plugins",
    "InitData": "adapter",
    "InitPlugin": "plugins",
    "InitRegistrar": "plugins",
    "InputMoments": "plugins",
    "LayerGroup": "plan",
    "LayerPlugin": "plugins",
    "LayerRegistrar": "plugins",
    "LayerSettings": "config",
    "LayerSummary": "plugins",
    "LeftOut": "plan",
    "LoraConfig": "config",
    "LoraError": "errors",
    "LoraModel": "model",
    "MergeError": "errors",
    "MergeReport": "merge",
    "MergedWeight": "merge",
    "Owned": "plugins",
    "PackedAdapter": "files",
    "Plan": "plan",
    "PlannedLayer": "plugins",
    "PluginError": "errors",
    "PluginInfo": "plugins",
    "PluginKind": "plugins",
    "RankRequest": "plugins",
    "Registry": "plugins",
    "Rescaling": "plugins",
    "RowMajorPlugin": "plugins",
    "Slot": "plugins",
    "SlotCalibration": "plugins",
    "StackedAdapters": "plugins",
    "StateError": "errors",
    "Storage": "plugins",
    "StoragePlugin": "plugins",
    "StorageRegistrar": "plugins",
    "TargetError": "errors",
    "Term": "plugins",
    "Tie": "plugins",
    "VariantPlugin": "plugins",
    "VariantRegistrar": "plugins",
    "build_registry": "plugins",
    "calibrate": "adapter",
    "hookimpl": "plugins",
    "load_quantized": "files",
}

__getattr__, __dir__ = lazily(__name__, _ROOMS, FUNCTIONS)
