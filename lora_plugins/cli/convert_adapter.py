"""`lora-plugins convert SRC DST --to FORMAT`: an adapter file of one format written in another."""

import importlib
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_plugins import LoraModel
from lora_plugins.errors import ConfigError, listing, nothing_there, sentence
from lora_plugins.files import format_of, options_of
from lora_plugins.formats import convert
from lora_plugins.hub import located
from lora_plugins.names import TRACEBACK_VARIABLE
from lora_plugins.plugins import FORMATS, OWN_FORMAT, default_registry
from lora_plugins.writable import check_writable_place


def run(given: Namespace) -> int:
    """Converts a file.

    Raises:
        AdapterFileError: If the source is damaged, does not fit the model, or cannot be expressed in the other format.
        ConfigError: If the model cannot be made, or is needed and was not named.
    """
    if given.weights is not None and given.model is None:
        raise ConfigError(
            "--weights are those of the base model, which --model does not name. Say --model MODULE:NAME."
        )
    check_writable_place(given.target, "The target")
    registry, found = default_registry(), located(given.source)
    source = registry.get(FORMATS, given.source_format) if given.source_format else format_of(found)
    target = registry.get(FORMATS, given.to)
    read, write = options_of(source, _options(given.read_option)), options_of(target, _options(given.write_option))
    if given.model is None:
        path = convert(found, source, read, given.target, target, write)
    else:
        model = _model(given.model, given.weights)
        lora = LoraModel.load_adapter(model, found, format=source.name, format_options=read)
        path = lora.save_adapter(given.target, format=target.name, format_options=write)
    print(f"Wrote {path} in the format {target.name!r}, from {given.source} in the format {source.name!r}.")
    if target.name == OWN_FORMAT:
        print("It will load on a base with the weights that this model had, which it compares.")
    return 0


def _options(given: Sequence[str]) -> dict[str, Any]:
    pairs = [each.partition("=") for each in given]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is no option: write NAME=VALUE, as in component=unet.")
    return {name: value for name, _, value in pairs}


def _model(named: Sequence[str], weights: Path | None) -> nn.Module:
    """Makes the base model."""
    path, *arguments = named
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise ConfigError(f"--model is {path!r}. It is the import path of a class or function: MODULE:NAME.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make: Any = importlib.import_module(module)
        for part in name.split("."):
            make = getattr(make, part)
        model = make(*arguments)
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(
            f"--model {shlex.join(named)} made no model: {type(error).__name__}: {sentence(error)} What it takes "
            f"stands after its name, as texts. {TRACEBACK_VARIABLE}=1 shows where it failed."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {path} made {model!r}, which is no torch.nn.Module.")
    if weights is not None:
        _load(model, weights)
    return model.eval()


def _load(model: nn.Module, weights: Path) -> None:
    """Puts the tensors of a file into the model, all of them."""
    if not weights.is_file():
        raise ConfigError(f"--weights is {weights}, and there is no such file. {nothing_there(weights)}")
    try:
        found = safetensors.torch.load_file(weights)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"--weights is {weights}, which is no safetensors file, or is cut off: {error}.") from error
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]): tensor for name, tensor in found.items() if name in own}
    # Of a tensor that several modules share, a file may have one name only.
    found = {**{name: given[id(tensor)] for name, tensor in own.items() if id(tensor) in given}, **found}
    other = sorted(name for name in {*own, *found} if _shape(own, name) != _shape(found, name))
    if other:
        raise ConfigError(
            f"--weights is {weights}, which does not fit the model: {listing(other)} differ in shape, or "
            "are in one of them only."
        )
    model.load_state_dict(found)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
