"""LoRA for vision models as a set of plugins.

Three lines adapt a model in place:

    lora = LoraModel(model, LoraConfig(r=8, target_modules=["attn.qkv"]))
    ...  # train `model` as usual: only the adapter requires gradients
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
    **dict.fromkeys(__all__, "plugins"),  # all but these
    **dict.fromkeys(("Calibration", "InitData", "calibrate"), "adapter"),
    **dict.fromkeys(("LayerSettings", "LoraConfig"), "config"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
    **dict.fromkeys(("PackedAdapter", "load_quantized"), "files"),
    **dict.fromkeys(("MergeReport", "MergedWeight"), "merge"),
    **dict.fromkeys(("LayerGroup", "LeftOut", "Plan"), "plan"),
    "LoraModel": "model",
}

__getattr__, __dir__ = lazily(__name__, _ROOMS, FUNCTIONS)
