"""Layers that a module builds while a checkpoint is loaded, in its own `on_load_checkpoint` or in `setup`."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lora_plugins import AdapterFileError
from lora_plugins.adapter import freeze_new_norms
from lora_plugins.errors import listing
from lora_plugins.inplace import modules_by_name
from lora_plugins.integrations.lightning.checkpoint.entry import checked_entry, entry_errors
from lora_plugins.integrations.lightning.checkpoint.state_dicts import StateDict, map_state_dicts, with_hidden
from lora_plugins.integrations.lightning.module import Start, adapted_targets, name_mapper
from lora_plugins.utils import plain_name


class PartOfBase(dict[str, Any]):
    """A state dict without those values of the frozen base that the module does not have yet."""

    def __missing__(self, key: str) -> Any:
        raise AdapterFileError(
            f"The module's on_load_checkpoint reads {key!r} from the checkpoint, which leaves the frozen base out, and "
            "the module has no such layer yet. Let the hook build the layer from a hyperparameter, or name the layer "
            "in modules_to_save: then it is in the file."
        )


def missing_layers(module: LightningModule, checkpoint: Mapping[str, Any]) -> list[str]:
    """Returns the names of modules that the adapters of a checkpoint need and the module does not have.

    Raises:
        AdapterFileError: If the entry is damaged.
    """
    with entry_errors():
        needed: list[str] = []
        for adapter in checked_entry(checkpoint)["adapters"]:
            manifest, path = adapter["manifest"], adapter["target"]
            values = [key.removeprefix("value/") for key in manifest["tensors"] if key.startswith("value/")]
            owners = ["", *manifest["layers"], *(value.rpartition(".")[0] for value in values)]
            needed += [".".join(part for part in (path, name) if part) for name in owners]
        present = modules_by_name(module)
        return [name for name in dict.fromkeys(needed) if name not in present]


def before_hook(
    module: LightningModule, checkpoint: Mapping[str, Any], restored: dict[str, Any] | None
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Prepares the module's own `on_load_checkpoint`, which may build layers, or build them again.

    It may also load parts of the adapted module, such as an average, from entries of its own.

    `restored` is the checkpoint, complete, with its adapters on the module; None where the module is not yet the one
    that they belong to.

    Returns:
        The checkpoint for the hook, with the module's frozen base, and what is to be called after it.
    """
    complete = _with_present_base(module, checkpoint) if restored is None else restored
    # The hook sees the names that the module has written; where an older entry does not say which, those that it has.
    if not checked_entry(checkpoint).get("compiled", True):
        complete = map_state_dicts(complete, _with_plain_names)
    base = {} if restored is None else _present_base(module, restored)
    rename = name_mapper(module)
    start = Start.of(module, but=[rename(key) for key in checked_entry(checkpoint)["left_out"]])

    def after() -> None:
        _put_base(module, base)
        start.mark_written(module)  # such as an average that the module keeps out of its state dict

    return complete, after


def without_base(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint without the frozen base, which a hook of the module may have built anew."""
    entry = checked_entry(checkpoint)
    added = {*entry["left_out"], *entry.get("base_tensors", {})}
    return map_state_dicts(
        checkpoint, lambda state: {k: value for k, value in state.items() if plain_name(k) not in added}
    )


def build_missing(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Calls the module's own `setup` if layers are missing that the adapters of a checkpoint need.

    Raises:
        AdapterFileError: If they are still missing, or if `setup` cannot be called without a Trainer.
    """
    missing, built, cause = missing_layers(module, checkpoint), "", None
    if missing and is_overridden("setup", module):
        try:
            module.setup("fit")
        except Exception as error:  # of the author's code, which may need the data or a Trainer
            why = f"{type(error).__name__}: {error}"
            built, cause = f" before setup(), and setup('fit') cannot be called without a Trainer ({why})", error
        else:
            missing = missing_layers(module, checkpoint)
    if missing:
        raise AdapterFileError(
            f"Adapters of the checkpoint need {listing(missing)}, which {type(module).__name__} does not have{built}. "
            "Give load_from_checkpoint the arguments of the class that make these layers, let on_load_checkpoint "
            "build them, or use trainer.test(module, ckpt_path=...)."
        ) from cause


def _present_base(module: LightningModule, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the module's own values of what a checkpoint leaves out or has merged weights of, by key."""
    entry, rename, own = checked_entry(checkpoint), name_mapper(module), module.state_dict()
    base = {key: own[key] for key in map(rename, entry.get("base", [])) if key in own}
    current = with_hidden(own, module)
    return base | {key: current[key] for key in map(rename, entry["left_out"]) if key in current}


def _with_present_base(module: LightningModule, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    rename, base = name_mapper(module), _present_base(module, checkpoint)
    return map_state_dicts(
        checkpoint, lambda state: PartOfBase({**base, **{rename(key): value for key, value in state.items()}})
    )


def _with_plain_names(state: StateDict) -> StateDict:
    plain = copy.copy(state)
    plain.clear()
    plain.update({plain_name(key): value for key, value in state.items()})
    return plain


def _put_base(module: LightningModule, base: Mapping[str, Tensor]) -> None:
    """Restores the frozen base of layers that a hook of the module has rebuilt, as a full file would."""
    for key, value in module.state_dict().items():
        if key in base and value.shape == base[key].shape:
            value.copy_(base[key])
    for name, parameter in module.named_parameters():
        if name in base:
            parameter.requires_grad_(False)
    for target in adapted_targets(module).values():
        freeze_new_norms(target)
