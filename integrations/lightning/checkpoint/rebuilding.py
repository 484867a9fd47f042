"""The line of Python that rebuilds the module of a checkpoint.

`YourModule.load_from_checkpoint` of Lightning cannot load a small file, and would list every key of the base. It looks
first at a hyperparameter `_instantiator`, and refuses one that it does not know with an error that shows it. So the
line stands there in the file, and what stood there is put back when one of ours reads it. So is the name of the one
argument by which some modules take all their hyperparameters: with it, Lightning would pass the line on to the module.
"""

import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lora_plugins import AdapterFileError, ConfigError
from lora_plugins.errors import listing, near
from lora_plugins.integrations.lightning.aliases import alias_in_use
from lora_plugins.integrations.lightning.checkpoint.adapted_networks import adapted_networks
from lora_plugins.integrations.lightning.checkpoint.attribute_dicts import (
    HYPERPARAMETERS,
    WRITTEN_AS_DICT,
    with_attribute_dicts,
)
from lora_plugins.integrations.lightning.checkpoint.entry import KEY, entry_errors
from lora_plugins.integrations.lightning.checkpoint.objects import argument_for_objects
from lora_plugins.integrations.lightning.checkpoint.written_checkpoints import written_by

_INSTANTIATOR = "_instantiator"
_STOOD_THERE = "instantiator"
LINE = "line"
_ONE_ARGUMENT = LightningModule.CHECKPOINT_HYPER_PARAMS_NAME


def with_line(checkpoint: Mapping[str, Any], module: LightningModule) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a checkpoint with which Lightning's own loader tells how to load it, and what to record in its entry."""
    saved = checkpoint.get(HYPERPARAMETERS, {})
    if type(saved) is not dict:
        return dict(checkpoint), {}
    # Lightning before 2.6.6 imports what stands there, and shows it up to the first dot.
    line = f"(this file has a LoRA adapter, and not the base: load it as follows) {rebuilding_line(module, None)}"
    one = {key: value for key, value in checkpoint.items() if key == _ONE_ARGUMENT}
    about = {_STOOD_THERE: saved.get(_INSTANTIATOR), "hyperparameters": HYPERPARAMETERS in checkpoint, **one}
    told = {**checkpoint, HYPERPARAMETERS: {**saved, _INSTANTIATOR: line}}
    return {key: value for key, value in told.items() if key not in one}, {LINE: about}


def without_line(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint as it was before `with_line`."""
    about, result = checkpoint[KEY].get(LINE), dict(checkpoint)
    if about is None:
        return result
    saved = {key: value for key, value in result.pop(HYPERPARAMETERS).items() if key != _INSTANTIATOR}
    if about[_STOOD_THERE] is not None:
        saved[_INSTANTIATOR] = about[_STOOD_THERE]
    if _ONE_ARGUMENT in about:
        result[_ONE_ARGUMENT] = about[_ONE_ARGUMENT]
    return {**result, HYPERPARAMETERS: saved} if about["hyperparameters"] else result


def original(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a small checkpoint with the hyperparameters of the module that it was made of."""
    with entry_errors():
        result = with_attribute_dicts(without_line(checkpoint))
    entry = {key: value for key, value in checkpoint[KEY].items() if key not in (LINE, WRITTEN_AS_DICT)}
    return {**result, KEY: entry}


def rebuilding_line(module: LightningModule, path: str | Path | None) -> str:
    """Returns a line of Python that loads a checkpoint of a module; what the file does not have is a `...` in it.

    Without a path, the checkpoint is one that is being written.
    """
    cls = type(module)
    name, for_objects = cls.__qualname__, "" if path is None else argument_for_objects(path)
    arguments = [name, "path" if path is None else repr(str(path))]
    networks, parameters = adapted_networks(module.hparams), inspect.signature(cls.__init__).parameters
    given = {*module.hparams, getattr(module, "_hparams_name", None)} - networks  # as in Lightning's checkpoints
    taken = sorted(networks if _takes_any(parameters) else networks & parameters.keys())
    arguments += [f"{key}=..." for key in dict.fromkeys([*missing_arguments(cls, given), *taken])]
    arguments += [for_objects] if for_objects else []
    door = "from lora_plugins.integrations.lightning import load_from_checkpoint"
    if alias_in_use():  # in a new program, too, ahead of the import of the class
        door = f"{door}, alias_pytorch_lightning; alias_pytorch_lightning()"
    imports = [door] if "<locals>" in name else [door, f"from {_module_of(cls)} import {name.partition('.')[0]}"]
    return "; ".join([*imports, f"module = load_from_checkpoint({', '.join(arguments)})"])


def _module_of(cls: type[LightningModule]) -> str:
    """Returns what a class is imported from; for a class of `__main__`, what another program would import."""
    if cls.__module__ not in ("__main__", "__mp_main__"):
        return cls.__module__
    program = sys.modules[cls.__module__]
    if program.__spec__ is not None:
        return program.__spec__.name
    stem = Path(getattr(program, "__file__", None) or "").stem
    return stem if stem.isidentifier() else "__main__"


def loading_lines(trainer: Trainer, module: LightningModule) -> list[str]:
    """Returns the line that loads the best checkpoint of a run, or the last one where nothing says what is best.

    Empty where the run has written no small file.
    """
    paths = [path for path in written_by(trainer.checkpoint_callbacks) if Path(path).is_file()]
    return [rebuilding_line(module, paths[0])] if paths else []


def missing_arguments(cls: type[LightningModule], given: Collection[str]) -> list[str]:
    """Returns the names of arguments that the constructor of a class needs, and that are not given."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [*inspect.signature(cls.__init__).parameters.values()][1:]
    needed = [each.name for each in parameters if each.kind in kinds and each.default is each.empty]
    return [name for name in needed if name not in given]


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a constructor takes `**kwargs`, to pass them on to the class that it inherits from, say."""
    return any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def check_arguments(cls: type[LightningModule], checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks that a checkpoint and a caller have all that the constructor of a class needs, and the caller no more.

    Raises:
        AdapterFileError: If something is missing, naming it.
        ConfigError: If the class does not take what the caller gives, which Lightning would drop.
    """
    saved = checkpoint.get(HYPERPARAMETERS, {})
    one = checkpoint.get(_ONE_ARGUMENT)
    parameters = inspect.signature(cls.__init__).parameters
    if one in (None, "kwargs") and not _takes_any(parameters):
        of_loading = inspect.signature(cls.load_from_checkpoint).parameters  # such as `strict`
        for name in given:
            if name not in parameters and name not in of_loading:
                raise ConfigError(f"{cls.__name__} takes no argument {name!r}. {near(name, [*parameters][1:])}")
    names = {*saved, *given, *([one] if one and one != "kwargs" else [])}
    missing = missing_arguments(cls, names)
    if missing and given.get("hparams_file") is None:  # which brings all of them
        raise AdapterFileError(
            f"{cls.__name__} needs {listing(missing)}, which the checkpoint does not have: its save_hyperparameters() "
            "left them out, or they are adapted networks, which would bring the base along. Give them to "
            f"load_from_checkpoint: {', '.join(f'{name}=...' for name in missing)}."
        )
