"""The door: what a plugin is, the hooks that it implements, and the registry of what is installed.

Layer types, inits, variants, formats and storages come through it, ours and other people's alike. `KINDS` describes
each kind once; whatever registers, lists, documents or checks plugins loops over it.
"""

from lora_plugins.plugins.computing import computes_as
from lora_plugins.plugins.discovery import ALLOW_VARIABLE, BLOCK_VARIABLE, LOAD_VARIABLE, names_in, require_installation
from lora_plugins.plugins.format import FORMATS, OWN_FORMAT, AdapterFormat, AdapterSummary, LayerSummary, PackedAdapter
from lora_plugins.plugins.hookspecs import (
    KINDS,
    FormatRegistrar,
    InitRegistrar,
    LayerRegistrar,
    StorageRegistrar,
    VariantRegistrar,
    hookimpl,
)
from lora_plugins.plugins.init import INITS, InitContext, InitPlugin, InputMoments, RankRequest, SlotCalibration
from lora_plugins.plugins.kind import GROUP, PluginKind, class_path
from lora_plugins.plugins.layer import LAYERS, BranchUse, ColumnMajorPlugin, LayerPlugin, RowMajorPlugin
from lora_plugins.plugins.lazy_weights import LazyWeights
from lora_plugins.plugins.manager import TRACE_VARIABLE, build_registry, default_registry, found_plugins, registry_of
from lora_plugins.plugins.owned import UNVERSIONED, Owned, PluginInfo, versioned
from lora_plugins.plugins.planned import PlannedLayer, Tie
from lora_plugins.plugins.registrar import Registrar
from lora_plugins.plugins.registry import Registry
from lora_plugins.plugins.slot import Slot
from lora_plugins.plugins.storage import STORAGES, Storage, StoragePlugin, storage_options
from lora_plugins.plugins.term import Rescaling, StackedAdapters, Term, add_delta, add_updates, joined, sum_of_deltas
from lora_plugins.plugins.variant import PLAIN, VARIANTS, VariantPlugin

__all__ = [
    "ALLOW_VARIABLE",
    "BLOCK_VARIABLE",
    "FORMATS",
    "GROUP",
    "INITS",
    "KINDS",
    "LAYERS",
    "LOAD_VARIABLE",
    "OWN_FORMAT",
    "PLAIN",
    "STORAGES",
    "TRACE_VARIABLE",
    "UNVERSIONED",
    "VARIANTS",
    "AdapterFormat",
    "AdapterSummary",
    "BranchUse",
    "ColumnMajorPlugin",
    "FormatRegistrar",
    "InitContext",
    "InitPlugin",
    "InitRegistrar",
    "InputMoments",
    "LayerPlugin",
    "LayerRegistrar",
    "LayerSummary",
    "LazyWeights",
    "Owned",
    "PackedAdapter",
    "PlannedLayer",
    "PluginInfo",
    "PluginKind",
    "RankRequest",
    "Registrar",
    "Registry",
    "Rescaling",
    "RowMajorPlugin",
    "Slot",
    "SlotCalibration",
    "StackedAdapters",
    "Storage",
    "StoragePlugin",
    "StorageRegistrar",
    "Term",
    "Tie",
    "VariantPlugin",
    "VariantRegistrar",
    "add_delta",
    "add_updates",
    "build_registry",
    "class_path",
    "computes_as",
    "default_registry",
    "found_plugins",
    "hookimpl",
    "joined",
    "names_in",
    "registry_of",
    "require_installation",
    "storage_options",
    "sum_of_deltas",
    "versioned",
]
