"""Strategies that split parameters over processes: FSDP2 (`ModelParallelStrategy`) and FSDP (`FSDPStrategy`).

Each process holds a part of every tensor, so a checkpoint cannot be completed with the frozen base before it is
loaded, as it is elsewhere. The adapters are on the module before it is sharded, in every stage; a file is compared
with them, exactly, and then only what it holds is loaded. Checked against Lightning 2.6.6 and torch 2.13.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
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
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraError, LoraModel, StateError
from lora_plugins.errors import listing
from lora_plugins.files.folder import PackedAdapter
from lora_plugins.integrations.lightning.checkpoint.content import KEY, check, frozen_keys, reading, state_key
from lora_plugins.integrations.lightning.module.compiled_names import plain_name

SHARDED = (ModelParallelStrategy, FSDPStrategy)
"""Strategies that this file serves."""

_META = "meta.pt"
"""The file of a distributed checkpoint's folder that holds all but tensors of module and optimizers."""

Load = Callable[..., dict[str, Any]]


def is_sharded(trainer: Trainer) -> bool:
    """Whether the trainer's strategy splits parameters over processes."""
    return isinstance(trainer.strategy, SHARDED)


class Early:
    """Adapts a module before its own `configure_model` shards it, if it can.

    Args:
        ensure: What adapts it.
    """

    def __init__(self, ensure: Callable[[], None]) -> None:
        self._ensure = ensure
        self.error: LoraError | None = None

    def __call__(self) -> None:
        """Keeps the error if layers are missing: they may be built in `configure_model`."""
        try:
            self._ensure()
        except ConfigError as error:  # TargetError is one
            self.error = error


def refuse_sharded(target: nn.Module, why: object) -> None:
    """Refuses a module that was sharded before it could be adapted.

    Args:
        target: The module.
        why: Why it could not be adapted before.

    Raises:
        StateError: If its parameters are split already. Adapters added now would not be kept in step between processes.
    """
    split = [name for name, parameter in target.named_parameters() if isinstance(parameter, DTensor)]
    split += [name for name, module in target.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if split:
        raise StateError(
            f"The module was sharded before it was adapted ({listing(split, 3)}), and adapters that are added now "
            "would differ between processes. Build all layers in __init__ or setup(); let configure_model() only shard "
            f"them: adapters join in between. Before configure_model() it could not be adapted: {why}"
        )


def refuse_wrapped(target: nn.Module) -> None:
    """Refuses a module of which FSDP wrapped parts on their own.

    Raises:
        StateError: If there are such parts, naming them.
    """
    parts = [name for name, module in target.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if parts:
        raise StateError(
            f"FSDP wrapped {listing(parts, 3)} on their own, by an auto_wrap_policy or by hand, and layers inside have "
            "other names then. Leave the policy out, or use ModelParallelStrategy (FSDP2), which shards any part."
        )


def refuse_missed(lora: LoraModel, adapter: str) -> None:
    """Refuses layers that should have been adapted and were built after everything was sharded.

    Raises:
        StateError: If the adapter's configuration fits layers that it does not adapt, naming them.
    """
    plan = lora.plans[adapter]
    missed = {layer.name for layer in LoraModel.plan(lora.model, plan.config).layers} - {x.name for x in plan.layers}
    if missed:
        raise StateError(
            f"{listing(sorted(missed))} were built in configure_model(), after the module was adapted. Build all "
            "layers in __init__ or setup(), and let configure_model() only shard them."
        )


def refuse_unfit(target: nn.Module, config: LoraConfig, trainer: Trainer) -> None:
    """Refuses what cannot be adapted ahead of sharding.

    Args:
        target: The module.
        config: The adapter's configuration.
        trainer: The trainer.

    Raises:
        StateError: If a tensor is on the meta device, or the init does more than start as an identity.
    """
    empty = [name for name, tensor in (*target.named_parameters(), *target.named_buffers()) if tensor.is_meta]
    if empty:
        raise StateError(
            f"{listing(empty, 3)} are on the meta device, so there is no base yet that could be adapted, and Lightning "
            "would fill adapters with anything. Load the pretrained weights before fit, in __init__ or setup()."
        )
    name = type(trainer.strategy).__name__
    init = LoraModel.plan(target, config).init
    if init.changes_base:
        raise StateError(f"The init {init.name!r} changes the base, which {name} would not keep. Choose another init.")
    if not init.identity and trainer.state.fn != "fit":
        raise StateError(
            f"With {name} a module is adapted before a checkpoint is read, and the init {init.name!r} is no identity: "
            f"without a checkpoint, {trainer.state.fn} would give results of neither. Use strategy='ddp' here."
        )


def full_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Gathers what is trained, by its key in the state dict; all processes have to call this together."""
    options = StateDictOptions(ignore_frozen_params=True)
    state = get_model_state_dict(_model(trainer), options=options)
    return {plain_name(key): _full(tensor, trainer.strategy.root_device) for key, tensor in state.items()}


def gathered(packed: PackedAdapter, path: str, tensors: Mapping[str, Tensor]) -> PackedAdapter:
    """Returns a packed adapter with its shards replaced by whole tensors.

    Args:
        packed: The adapter, as one process has it.
        path: Its target.
        tensors: What `full_tensors` returned.
    """
    keys = {key: state_key(path, packed.manifest["adapter_name"], key) for key in packed.tensors}
    whole = {key: tensors.get(keys[key], tensor) for key, tensor in packed.tensors.items()}
    about = {key: {**packed.manifest["tensors"][key], "shape": list(tensor.shape)} for key, tensor in whole.items()}
    return PackedAdapter({**packed.manifest, "tensors": about}, whole)


def save(trainer: Trainer, checkpoint: dict[str, Any], path: Path, write: Callable[..., None]) -> None:
    """Writes a checkpoint under a temporary name and renames it.

    A new name has nothing or a whole checkpoint, whenever the process is killed. Where a folder replaces another, the
    old one is moved aside first, to `.NAME.old`.

    Args:
        trainer: The trainer.
        checkpoint: What to write.
        path: The file, or the folder of a distributed checkpoint.
        write: The strategy's own method.
    """
    path = Path(trainer.strategy.broadcast(path))
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if trainer.is_global_zero:
        _remove(partial)
        _remove(old)
    trainer.strategy.barrier()
    write(checkpoint, partial)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        if path.exists() and (path.is_dir() or partial.is_dir()):
            os.replace(path, old)
        os.replace(partial, path)
        _remove(old)
    trainer.strategy.barrier()


def load(trainer: Trainer, path: Path, read: Load, **options: Any) -> dict[str, Any]:
    """Loads a checkpoint into the sharded module and its optimizers.

    Args:
        trainer: The trainer.
        path: The file, or the folder of a distributed checkpoint.
        read: The strategy's own method.
        **options: Its arguments.

    Returns:
        The rest of the checkpoint, as Lightning's own strategies do.

    Raises:
        AdapterFileError: If the file does not fit the module's adapters. Nothing was loaded then.
    """
    path = Path(trainer.strategy.broadcast(path))
    if not path.is_dir():
        return _load_file(trainer, path, read, **options)
    with reading(path):
        rest: dict[str, Any] = torch.load(path / _META, map_location="cpu", weights_only=True)
        keys = set(FileSystemReader(path).read_metadata().state_dict_metadata)
    name = "model" if isinstance(trainer.strategy, FSDPStrategy) else "state_dict"
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
    with reading(path):
        whole = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    _check(trainer, path, whole, set(whole["state_dict"]))
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
    check(module, checkpoint, state)
    needed = state.keys() - {plain_name(key) for key in frozen_keys(module)}
    if needed != saved:
        raise AdapterFileError(
            f"{path} does not fit the module: {listing(sorted(needed ^ saved))} are only in one of them."
        )


def _model(trainer: Trainer) -> nn.Module:
    model = trainer.strategy.model
    assert model is not None
    return model


def _full(tensor: Any, device: torch.device) -> Tensor:
    """Gathers a tensor; what FSDP holds, on the first process only."""
    if isinstance(tensor, ShardedTensor):
        whole = torch.empty(tensor.size(), dtype=tensor.dtype, device=device)
        tensor.gather(0, whole if torch.distributed.get_rank() == 0 else None)
        return whole
    return cast(Tensor, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
