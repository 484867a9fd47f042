"""LoRA for vision models as a set of plugins.

Three lines adapt a model in place:

    lora = LoraModel(model, LoraConfig(r=8, target_modules=["attn.qkv"]))
    ...  # train `model` as ever: only the adapter requires gradients
    lora.merge_and_unload()

A plugin is a module named by an entry point of the group `lora_plugins`, with functions marked by `hookimpl` that
register layer types (`LayerPlugin`), inits (`InitPlugin`), variants (`VariantPlugin`), formats (`AdapterFormat`) or
storages of weights (`StoragePlugin`); see `lora_plugins.plugins.hookspecs`.
"""

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
