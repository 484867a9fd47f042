"""A base that is stored in fewer bytes as it is read: one tensor after the other, never the float model as a whole."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_plugins.adapter import by_layer, check_shared, whole
from lora_plugins.arguments import with_checked_call
from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, counted, listing
from lora_plugins.inplace import StoredWeight, full_name, model_modules, of_all_modules, put_stored, stored_weights
from lora_plugins.plan import weights_to_store
from lora_plugins.plugins import Registry, Storage, registry_of
from lora_plugins.utils import are_finite

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a folder of Hugging Face has: one file, or an index of several."""


@with_checked_call
@torch.no_grad()
def load_quantized(
    model: nn.Module,
    path: str | Path,
    config: LoraConfig,
    *,
    registry: Registry | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Loads values into a model on the meta device, and stores those in fewer bytes that a config names.

    Each tensor is read, stored and forgotten before the next one, so that memory peaks at the stored size plus what one
    layer takes. The same bits are stored as by `LoraModel(model, config)` on the float model, which may
    follow with the same config.

    Args:
        model: A model whose parameters are on the meta device: `with torch.device("meta"): model = build()`.
        path: A safetensors file, an index (`.index.json`), or a folder with `model.safetensors` or its index.
        config: The config of the adapter that is to come; its `quantize` fields say what is stored, and how.
        registry: The plugins to use; by default those that the config lets load.
        device: Where the values go.

    Returns:
        The model. Where the call fails or is interrupted, it is untouched.

    Raises:
        TargetError: If a parameter of the model has no shape yet, or a pattern of the config matches nothing.
        MergeError: If a weight would be stored that another layer shares, which keeps it as it is.
        ConfigError: If the config has no `quantize`, the file cannot be read, its keys are not those of the model's
            state dict, a tensor of the model would stay without values, a weight that would be stored has values that
            are not finite, or some weights of the model are stored already.
        StateError: If parameters of the model were made in inference mode.
    """
    if config.quantize is None:
        raise ConfigError("load_quantized stores weights as the config says, and it has no quantize. Set it, as 'nf4'.")
    if there := of_all_modules(model, stored_weights):
        raise ConfigError(
            f"These weights are stored already: {listing(there)}. load_quantized fills a model that was just built: "
            "build it on the meta device again."
        )
    stored = weights_to_store(model, config, registry or registry_of(config))
    files = _files(Path(path))
    places = _places(model)
    check_shared(model, by_layer(stored), to="store")
    storages = {id(_tensor(places[name])): storage for name, storage in stored.items()}
    _check_keys(model, places, files)
    made: dict[int, Tensor | StoredWeight] = {}
    for key, file in files.items():
        old = _tensor(places[key])
        made[id(old)] = _made(key, _read(file, key), old, storages.get(id(old)), device)
    new = {place: made[id(_tensor(place))] for place in places.values()}
    whole(model, lambda: _put_all(new))
    return model


def _made(
    key: str, value: Tensor, old: Tensor, storage: Storage | None, device: torch.device | str
) -> Tensor | StoredWeight:
    """Returns what takes the place of a tensor of the model: a parameter, a buffer, or a stored weight."""
    value = value.to(device, old.dtype, copy=storage is None)
    if storage is None:
        return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    if not are_finite(value):
        raise ConfigError(f"{key!r} has values that are not finite, which cannot be stored as {storage}.")
    return StoredWeight(storage, value, requires_grad=old.requires_grad)


def _put_all(tensors: Mapping[tuple[nn.Module, str], Tensor | StoredWeight]) -> None:
    for (module, name), new in tensors.items():
        if isinstance(new, StoredWeight):
            put_stored(module, name, new)
        elif isinstance(new, nn.Parameter):
            module._parameters[name] = new
        else:
            module._buffers[name] = new


def _files(path: Path) -> dict[str, Path]:
    """Returns the file of each tensor."""
    if path.is_dir():
        path = path / (_INDEX if (path / _INDEX).is_file() else _FILE)
    if not path.is_file():
        raise ConfigError(f"{path} is not there. Give a safetensors file, an index of some, or their folder.")
    if path.suffix != ".json":
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    try:
        weights = json.loads(path.read_text())["weight_map"]
        return {str(key): path.parent / Path(str(name)).name for key, name in weights.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as an index of safetensors files: {error!r}.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
            yield file
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}.") from error


def _read(path: Path, key: str) -> Tensor:
    """Returns a tensor that is mapped from its file: whatever is kept must be a copy."""
    # Opened anew for each tensor: the pages of a file that stays open stay in memory.
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Returns module and attribute name of each tensor of a model's state dict, under all its names."""
    places: dict[str, tuple[nn.Module, str]] = {}
    for entry in model_modules(model):
        module = entry.module
        tensors = (*module._parameters.items(), *module._buffers.items())
        unsaved = module._non_persistent_buffers_set
        held = [key for key, tensor in tensors if tensor is not None and key not in unsaved]
        places |= {full_name(alias, key): (module, key) for alias in entry.names for key in held}
    return places


def _check_keys(model: nn.Module, places: Mapping[str, tuple[nn.Module, str]], files: Mapping[str, Path]) -> None:
    """Checks that the files have a value for each tensor of the model, of its shape, and nothing else."""
    surplus = [key for key in files if key not in places]
    given = {id(_tensor(places[key])) for key in files if key in places}
    missing = [key for key, place in places.items() if id(_tensor(place)) not in given]
    empty = [
        full_name(entry.name, name)
        for entry in model_modules(model)
        for name in entry.module._non_persistent_buffers_set
        if (buffer := entry.module._buffers.get(name)) is not None and buffer.is_meta
    ]
    if surplus or missing:
        raise ConfigError(
            f"The file and the model differ: {counted(len(missing), 'tensor')} only in the model "
            f"({listing(missing) or 'none'}), {len(surplus)} only in the file ({listing(surplus) or 'none'})."
        )
    if empty:
        raise ConfigError(
            f"{listing(empty)} is on the meta device and in no state dict, so no file has its values. Compute it, and "
            "set it on the model before."
        )
    for key, file in files.items():
        with _opened(file) as opened:
            shape = opened.get_slice(key).get_shape()
        if list(_tensor(places[key]).shape) != list(shape):
            raise ConfigError(f"{key!r} is {shape} in {file.name} and {list(_tensor(places[key]).shape)} in the model.")


def _tensor(place: tuple[nn.Module, str]) -> Tensor:
    module, name = place
    parameter = module._parameters.get(name)
    tensor = module._buffers[name] if parameter is None else parameter
    assert tensor is not None
    return tensor
