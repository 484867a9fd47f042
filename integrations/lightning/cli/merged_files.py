"""The commands `export` and `merge`: a checkpoint with an adapter becomes a file that needs no lora_plugins."""

import argparse
import importlib
import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lora_plugins import ConfigError, LoraModel
from lora_plugins.errors import near
from lora_plugins.integrations.lightning.checkpoint import load_from_checkpoint, read_checkpoint
from lora_plugins.integrations.lightning.module import adapted_targets, plain_state_dict, write_safetensors
from lora_plugins.utils import replace_file

_SAVED = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name", "hparams_type")
"""Entries of a checkpoint that still hold after a merge; optimizers and loops belong to the adapter's training."""


def run(arguments: list[str]) -> None:
    """Runs `export` or `merge` from the arguments of the command line, the command included."""
    parser = argparse.ArgumentParser(prog=f"lora-plugins {arguments[0]}", description=_DESCRIPTIONS[arguments[0]])
    parser.add_argument("checkpoint", help="a checkpoint with an adapter")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--model", required=True, help="import path of the LightningModule's class")
    given = parser.parse_args(arguments[1:])
    write = {"export": export_checkpoint, "merge": merge_checkpoint}[arguments[0]]
    print(f"Merged model: {write(_import_class(given.model), given.checkpoint, given.output)}")


_DESCRIPTIONS = {
    "export": "Writes the adapted network, merged, as a plain state dict (.safetensors) of the untouched architecture.",
    "merge": "Writes a plain checkpoint of Lightning (.ckpt) with the adapter merged into the weights.",
}


def export_checkpoint(module_class: type[LightningModule], checkpoint: str | Path, output: str | Path) -> Path:
    """Writes the plain state dict of what a checkpoint's adapters adapt, with the adapters merged.

    Args:
        module_class: The class the checkpoint was made from.
        checkpoint: The checkpoint.
        output: A `.safetensors` file. Its keys are relative to the adapters' target.

    Returns:
        The file.

    Raises:
        AdapterFileError: If the checkpoint does not fit the class.
        ConfigError: If the name ends otherwise, or the adapters have several targets.
    """
    output = _with_suffix(output, ".safetensors")
    module = load_from_checkpoint(module_class, checkpoint)
    targets = adapted_targets(module)
    if len(targets) > 1:
        raise ConfigError(f"The adapters have {len(targets)} targets: {', '.join(targets)}. Use `merge` instead.")
    (target,) = targets.values()
    return write_safetensors(output, plain_state_dict(LoraModel(target).merge_and_unload()))


def merge_checkpoint(module_class: type[LightningModule], checkpoint: str | Path, output: str | Path) -> Path:
    """Writes a checkpoint with the adapters merged, which `module_class.load_from_checkpoint` loads as it is.

    Args:
        module_class: The class the checkpoint was made from.
        checkpoint: The checkpoint.
        output: A `.ckpt` file. It holds weights and arguments of the class; training cannot go on from it.

    Returns:
        The file.

    Raises:
        AdapterFileError: If the checkpoint does not fit the class.
        ConfigError: If the name ends otherwise.
    """
    output = _with_suffix(output, ".ckpt")
    module = load_from_checkpoint(module_class, checkpoint)
    for target in adapted_targets(module).values():
        LoraModel(target).merge_and_unload()
    saved: dict[str, Any] = {key: value for key, value in read_checkpoint(checkpoint).items() if key in _SAVED}
    output.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    torch.save({**saved, "state_dict": module.state_dict()}, data)
    replace_file(output, data.getvalue())
    return output


def _with_suffix(path: str | Path, suffix: str) -> Path:
    if Path(path).suffix != suffix:
        raise ConfigError(f"The output is {str(path)!r}. It names a file that ends in {suffix}.")
    return Path(path)


def _import_class(path: str) -> type[LightningModule]:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"--model is {path!r}, and there is no module {error.name!r}.") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)] if module else []
        raise ConfigError(f"--model is {path!r}, which is no class of LightningModule. {near(name, classes)}")
    return found
