"""Compares the adapters of a checkpoint with those of a module: same configuration, same tensors, same base."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_plugins import AdapterFileError, LoraModel
from lora_plugins.adapter import model_state
from lora_plugins.errors import listing
from lora_plugins.files import PackedAdapter, differing_base, differing_config
from lora_plugins.inplace import submodule
from lora_plugins.integrations.lightning.checkpoint.entry import checked_entry, entry_errors
from lora_plugins.integrations.lightning.checkpoint.state_dicts import as_saved, state_key
from lora_plugins.integrations.lightning.module import adapters_by_place


def check_adapters(module: nn.Module, checkpoint: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Checks that a checkpoint has the adapters of a module whose tensors are split over processes.

    `whole` is the module's state dict as its strategy has it, which knows the whole shapes.

    Raises:
        AdapterFileError: If the entry is damaged or newer, or the adapters are not the same ones on the same base.
    """
    entry = checked_entry(checkpoint)
    with entry_errors():
        for adapter in entry["adapters"]:
            target, packed = locate_adapter(module, adapter, {})
            name, state = str(packed.manifest.get("adapter_name")), model_state(target)
            if state is None or name not in state.adapters:
                raise AdapterFileError(
                    f"The checkpoint has an adapter {name!r} on {adapter['target'] or 'the module'!r}, and the module "
                    "has none there. Use the adapter_name and target it was trained with."
                )
            own = LoraModel(target).pack(name)
            keys = {key: state_key(adapter["target"], name, key) for key in own.tensors}
            check_same_adapter(name, PackedAdapter(as_saved(own.manifest, keys, whole), own.tensors), packed)
        check_no_surplus(adapters_by_place(module), entry)


def locate_adapter(
    module: nn.Module, adapter: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[nn.Module, PackedAdapter]:
    """Returns the target of an adapter of an entry, and the adapter with its tensors collected from a saved state dict.

    Raises:
        AdapterFileError: If the module has no such target.
    """
    path = adapter["target"]
    try:
        target = submodule(module, path)
    except AttributeError as error:
        raise AdapterFileError(
            f"The checkpoint has an adapter for {path!r}, which {type(module).__name__} does not have."
        ) from error
    manifest = adapter["manifest"]
    keys = {key: state_key(path, str(manifest.get("adapter_name")), key) for key in manifest["tensors"]}
    tensors = {key: saved[own] for key, own in keys.items() if own in saved} | adapter["tensors"]
    return target, PackedAdapter(manifest, tensors)


def check_same_adapter(name: str, own: PackedAdapter, packed: PackedAdapter) -> None:
    """Checks that an adapter of a checkpoint is one of the same kind, on the same base, as that of the module.

    Raises:
        AdapterFileError: If configuration, tensors or base differ, naming what does.
    """
    check_same_config(name, own.manifest["config"], packed)
    here, there = own.manifest["tensors"], packed.manifest["tensors"]
    if set(here) != set(there):
        odd = sorted(set(here) ^ set(there))
        raise AdapterFileError(
            f"The checkpoint's adapter {name!r} belongs to another model: {listing(odd)} are only in one of them."
        )
    for key, about in here.items():
        if about["shape"] != there[key]["shape"]:
            raise AdapterFileError(
                f"The checkpoint's adapter {name!r} belongs to another model: {key!r} is "
                f"{there[key]['shape']} in the file and {about['shape']} here."
            )
    if wrong := differing_base(own, packed):
        count = len(own.manifest["base"]) + len(own.manifest.get("stored", {}))
        raise AdapterFileError(
            f"The checkpoint's adapter {name!r} was trained on another base: {listing(wrong)} differ from the weights "
            f"it was made for ({len(wrong)} of {count}). Load the same pretrained weights first, unmerged."
        )


def check_same_config(name: str, own: Mapping[str, Any], packed: PackedAdapter) -> None:
    """Checks that an adapter of a checkpoint has the configuration of that of the module.

    Raises:
        AdapterFileError: If it differs, naming in what.
    """
    if details := differing_config(own, packed.manifest["config"]):
        raise AdapterFileError(
            f"The checkpoint's adapter {name!r} has another configuration: {details}. Use the configuration of the "
            "file, or start without ckpt_path."
        )


def check_no_surplus(places: Iterable[tuple[str, str]], entry: Mapping[str, Any]) -> None:
    """Checks that the module has, or gets, no adapter that the checkpoint lacks: it would act with its initial values.

    Raises:
        AdapterFileError: If it has some, naming them.
    """
    known = {(adapter["target"], adapter["manifest"]["adapter_name"]) for adapter in entry["adapters"]}
    surplus = [place for place in places if place not in known]
    if surplus:
        here, there = (
            [f"{name} on {path or 'the module'}" for path, name in each] for each in (surplus, sorted(known))
        )
        raise AdapterFileError(
            f"The module has adapters that the checkpoint does not have: {listing(here)}. The checkpoint has "
            f"{listing(there)}. Use the adapter_name and target it was trained with."
        )
