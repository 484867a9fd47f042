"""The commands `export` and `merge`: a checkpoint with an adapter becomes a file that needs no lora_plugins."""

import importlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import LightningModule

from lora_plugins import ConfigError, LoraModel
from lora_plugins.errors import near, sentence
from lora_plugins.integrations.lightning.checkpoint import KEY, Global, load_from_checkpoint, read_checkpoint
from lora_plugins.integrations.lightning.cli.yaml_texts import parsed_yaml
from lora_plugins.integrations.lightning.module import (
    adapted_targets,
    file_entries,
    plain_state_dict,
    whole_state_dict,
    write_safetensors,
)
from lora_plugins.merge import DEFAULT_MAX_ERROR
from lora_plugins.names import TRACEBACK_VARIABLE
from lora_plugins.utils import replace_torch_file
from lora_plugins.writable import check_writable_file

_OF_TRAINING = (
    *("loops", "callbacks", "optimizer_states", "lr_schedulers"),
    *("current_model_state", "averaging_state", "MixedPrecision", "FSDPPrecision"),
)
"""Entries of a checkpoint that belong to the adapter's training; the others still hold, and modules may read them."""


def run(command: str, given: Namespace) -> None:
    """Runs `export` or `merge`."""
    write = {"export": export_checkpoint, "merge": merge_checkpoint}[command]
    values, module_class = dict(map(_argument, given.argument)), _import_class(given.model)
    if not Path(given.checkpoint).exists():
        raise ConfigError(f"There is no {given.checkpoint}. Give a checkpoint with an adapter.")
    options = {} if given.max_error is None else {"max_error": given.max_error}
    try:
        path = write(
            module_class, given.checkpoint, given.output, allow_globals=given.allow_globals, **options, **values
        )
    except TypeError as error:  # of a class that does not take the arguments
        raise ConfigError(
            f"{given.checkpoint} cannot be loaded as a {module_class.__name__}: {sentence(error)} Give --model "
            f"the class that it is of, and --argument what that takes. {TRACEBACK_VARIABLE}=1 shows where it failed."
        ) from error
    print(f"Merged model: {path}")


def export_checkpoint(
    module_class: type[LightningModule],
    checkpoint: str | Path,
    output: str | Path,
    *,
    allow_globals: Sequence[Global] = (),
    weights_only: bool = True,
    max_error: float = DEFAULT_MAX_ERROR,
    **kwargs: Any,
) -> Path:
    """Writes the plain state dict of what a checkpoint's adapters adapt, with the adapters merged.

    Args:
        module_class: The class the checkpoint was made from.
        checkpoint: The checkpoint.
        output: A `.safetensors` file. Its keys are relative to the adapters' target.
        allow_globals: As in `load_from_checkpoint`.
        weights_only: Likewise.
        max_error: Share of an update that rounding may lose, as in `LoraModel.merge_and_unload`.
        **kwargs: Arguments of the class, as in `load_from_checkpoint`.

    Returns:
        The file.

    Raises:
        AdapterFileError: If the checkpoint does not fit the class.
        ConfigError: If the name ends otherwise, nothing can be written there, or the adapters have several targets.
        MergeError: If rounding would lose more of an update.
    """
    output = _checked_output(output, ".safetensors")
    module = load_from_checkpoint(
        module_class, checkpoint, allow_globals=allow_globals, weights_only=weights_only, **kwargs
    )
    targets = adapted_targets(module)
    if len(targets) > 1:
        raise ConfigError(f"The adapters have {len(targets)} targets: {', '.join(targets)}. Use `merge` instead.")
    ((name, target),) = targets.items()
    tensors = plain_state_dict(LoraModel(target).merge_and_unload(max_error=max_error, dequantize=True))
    return write_safetensors(output, tensors, file_entries(module, name))


def merge_checkpoint(
    module_class: type[LightningModule],
    checkpoint: str | Path,
    output: str | Path,
    *,
    allow_globals: Sequence[Global] = (),
    weights_only: bool = True,
    max_error: float = DEFAULT_MAX_ERROR,
    **kwargs: Any,
) -> Path:
    """Writes a checkpoint with the adapters merged, which `module_class.load_from_checkpoint` loads as any other.

    Args:
        module_class: The class the checkpoint was made from.
        checkpoint: The checkpoint.
        output: A `.ckpt` file. It holds weights, arguments of the class and what its `on_save_checkpoint` wrote;
            training cannot go on from it.
        allow_globals: As in `load_from_checkpoint`.
        weights_only: Likewise.
        max_error: Share of an update that rounding may lose, as in `LoraModel.merge_and_unload`.
        **kwargs: Arguments of the class, as in `load_from_checkpoint`. The file holds those of the checkpoint only.

    Returns:
        The file.

    Raises:
        AdapterFileError: If the checkpoint does not fit the class.
        ConfigError: If the name ends otherwise, or nothing can be written there.
        MergeError: If rounding would lose more of an update.
    """
    output = _checked_output(output, ".ckpt")
    module = load_from_checkpoint(
        module_class, checkpoint, allow_globals=allow_globals, weights_only=weights_only, **kwargs
    )
    for target in adapted_targets(module).values():
        LoraModel(target).merge_and_unload(max_error=max_error, dequantize=True)
    read = read_checkpoint(checkpoint, allow_globals=allow_globals, weights_only=weights_only)
    kept = {key: value for key, value in read.items() if key not in (KEY, *_OF_TRAINING)}
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_torch_file(output, {**kept, "state_dict": whole_state_dict(module)})
    return output


def _argument(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--argument is {given!r}. It has the form NAME=VALUE, such as width=64.")
    return name, parsed_yaml(value)


def _checked_output(path: str | Path, suffix: str) -> Path:
    if Path(path).suffix != suffix:
        raise ConfigError(f"The output is {str(path)!r}. It names a file that ends in {suffix}.")
    check_writable_file(Path(path), "The output")
    return Path(path)


def _import_class(path: str) -> type[LightningModule]:
    module_name, _, name = path.rpartition(".")
    if path.startswith("."):  # which Python takes for a module beside the calling one
        raise ConfigError(f"--model is {path!r}, which is no import path. Write it so: package.module.Class.")
    try:
        module = importlib.import_module(module_name) if module_name else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"--model is {path!r}, and there is no module {error.name!r}.") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigError(f"--model is {path!r}, which is no class of a LightningModule.{_near_class(module, name)}")
    return found


def _near_class(module: ModuleType | None, name: str) -> str:
    """Suggests classes of a module, including those that it imports lazily."""
    known = getattr(module, "__all__", None) or dir(module)
    found = [
        each
        for each in known
        if isinstance(value := getattr(module, each, None), type) and issubclass(value, LightningModule)
    ]
    return f" {near(name, found)}" if found else " Write its import path: package.module.Class."
