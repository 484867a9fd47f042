"""Checkpoints of a module whose tensors are split over processes.

Each process has a shard of every tensor, so a checkpoint cannot be completed with the frozen base before it is loaded,
as it is elsewhere. The file is compared with the adapters that the module has, exactly, and then only what the file
holds is loaded. Checked against Lightning 2.6.6 and torch 2.13.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.tensor import DTensor

from lora_plugins import AdapterFileError
from lora_plugins.errors import listing
from lora_plugins.files import PackedAdapter
from lora_plugins.integrations.lightning.checkpoint import KEY, check_adapters, check_whole, reading_errors, state_key
from lora_plugins.integrations.lightning.module import frozen_keys
from lora_plugins.integrations.lightning.strategies.file_checkpoint import partial_path
from lora_plugins.integrations.lightning.strategies.folder_sums import check_sums, write_sums
from lora_plugins.utils import plain_name

_META = "meta.pt"
"""The file of a distributed checkpoint's folder that holds all but tensors of module and optimizers."""

Load = Callable[..., dict[str, Any]]


def gather_adapter(trainer: Trainer, packed: PackedAdapter, path: str) -> PackedAdapter:
    """Returns a packed adapter with its shards replaced by whole tensors; all processes have to call this together."""
    tensors = _trained_tensors(trainer)
    keys = {key: state_key(path, packed.manifest["adapter_name"], key) for key in packed.tensors}
    whole = {key: tensors.get(keys[key], tensor) for key, tensor in packed.tensors.items()}
    about = {key: {**packed.manifest["tensors"][key], "shape": list(tensor.shape)} for key, tensor in whole.items()}
    return PackedAdapter({**packed.manifest, "tensors": about}, whole)


def save_sharded(trainer: Trainer, checkpoint: dict[str, Any], path: Path, write: Callable[..., None]) -> None:
    """Writes a file, or the folder of a distributed checkpoint, under a temporary name and renames it.

    A new name has nothing or a whole checkpoint, whenever the process is killed. Where a folder replaces another, the
    old one is moved aside first, to `.NAME.old`.
    """
    path = Path(trainer.strategy.broadcast(path))
    partial, old = partial_path(path), path.with_name(f".{path.name}.old")
    if trainer.is_global_zero:
        _remove(partial)
        _remove(old)
    trainer.strategy.barrier()
    write(checkpoint, partial)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        if partial.is_dir():
            write_sums(partial)
        if path.exists() and (path.is_dir() or partial.is_dir()):
            os.replace(path, old)
        os.replace(partial, path)
        _remove(old)
    trainer.strategy.barrier()


def load_sharded(trainer: Trainer, path: Path, read: Load, **options: Any) -> dict[str, Any]:
    """Loads a file, or the folder of a distributed checkpoint, into the sharded module and its optimizers.

    Returns:
        The rest of the checkpoint, as Lightning's own strategies do.

    Raises:
        AdapterFileError: If the file is damaged, or does not fit the module's adapters. Nothing was loaded then.
    """
    path = Path(trainer.strategy.broadcast(path))
    if not path.is_dir():
        return _load_file(trainer, path, read, **options)
    with reading_errors(path):
        check_sums(path)
        rest: dict[str, Any] = torch.load(path / _META, map_location="cpu", weights_only=True)
        keys = set(FileSystemReader(path).read_metadata().state_dict_metadata)
    name = "model" if any(key.startswith("model.") for key in keys) else "state_dict"  # FSDP's, and FSDP2's
    saved = {key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")}
    _check(trainer, path, rest, saved)
    _load_shards(trainer, path, name, saved, {key.partition(".")[0] for key in keys})
    return rest


def _load_shards(trainer: Trainer, path: Path, name: str, saved: set[str], entries: set[str]) -> None:
    model = _model(trainer)
    whole = get_model_state_dict(model)
    state = {name: {key: tensor for key, tensor in whole.items() if plain_name(key) in saved}}
    load_shards(state, checkpoint_id=path)
    set_model_state_dict(model, {**whole, **state[name]})
    if trainer.state.fn != "fit":
        return
    for index, optimizer in enumerate(trainer.strategy.optimizers):
        key = f"optimizer_{index}"
        if key in entries:  # a file of weights only has none; Lightning says so afterwards
            loaded = {key: get_optimizer_state_dict(model, optimizer)}
            load_shards(loaded, checkpoint_id=path)
            set_optimizer_state_dict(model, optimizer, loaded[key])


def _load_file(trainer: Trainer, path: Path, read: Load, **options: Any) -> dict[str, Any]:
    with reading_errors(path):
        whole = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    check_whole(path, whole)
    _check(trainer, path, whole, set(whole["state_dict"]))
    if trainer.state.fn == "fit":
        _check_optimizers(trainer, path, whole)
    module = trainer.lightning_module
    strict = module.strict_loading
    module.strict_loading = False  # the keys were compared; those of the base are not in the file
    try:
        return read(path, **options)
    finally:
        module.strict_loading = strict


def _check(trainer: Trainer, path: Path, checkpoint: Mapping[str, Any], saved: set[str]) -> None:
    module = trainer.lightning_module
    if KEY not in checkpoint:
        raise AdapterFileError(
            f"{path} holds no adapter of lora_plugins, and the module was adapted before it was sharded, which cannot "
            "be taken back. Remove the LoraCallback to load it."
        )
    state = {plain_name(key): tensor for key, tensor in get_model_state_dict(_model(trainer)).items()}
    check_adapters(module, checkpoint, state)
    needed = state.keys() - frozen_keys(module)
    if needed != saved:
        raise AdapterFileError(
            f"{path} does not fit the module: {listing(sorted(needed ^ saved))} are only in one of them."
        )


def _check_optimizers(trainer: Trainer, path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuses optimizer states whose parameters are numbered differently than here, where frozen ones count."""
    numbers = {id(parameter): number for number, parameter in enumerate(_model(trainer).parameters())}
    for optimizer, state in zip(trainer.strategy.optimizers, checkpoint.get("optimizer_states", []), strict=False):
        saved = [number for group in state["param_groups"] for number in group["params"] if isinstance(number, int)]
        own = [numbers.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
        if saved and set(saved) != set(own):
            raise AdapterFileError(
                f"{path} was not written by a strategy that shards parameters: the state of its optimizer numbers them "
                "differently, so training cannot resume from it here. Use the strategy that wrote it; validate, test "
                "and predict take the file."
            )


def _trained_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Gathers what is trained, by its key in the state dict; all processes have to call this together."""
    state = get_model_state_dict(_model(trainer), options=StateDictOptions(ignore_frozen_params=True))
    return {plain_name(key): _whole(tensor, trainer.strategy.root_device) for key, tensor in state.items()}


def _whole(tensor: Any, device: torch.device) -> Tensor:
    """Gathers a tensor; those of FSDP on the first process only."""
    if isinstance(tensor, ShardedTensor):
        whole = torch.empty(tensor.size(), dtype=tensor.dtype, device=device)
        tensor.gather(0, whole if torch.distributed.get_rank() == 0 else None)
        return whole
    return cast(Tensor, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _model(trainer: Trainer) -> nn.Module:
    model = trainer.strategy.model
    assert model is not None
    return model


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
