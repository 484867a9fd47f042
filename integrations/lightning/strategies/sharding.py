"""Strategies that split parameters over processes: FSDP2 (`ModelParallelStrategy`) and FSDP (`FSDPStrategy`).

Each process has a shard of every tensor, so the adapters have to be on the module before it is sharded, in every stage.
Checked against Lightning 2.6.6 and torch 2.13.
"""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lora_plugins import ConfigError, LoraConfig, LoraError, LoraModel, StateError
from lora_plugins.adapter import adapter_parameters, model_state
from lora_plugins.errors import listing, sentence
from lora_plugins.inplace import foreign_weights, of_all_modules, stored_weights
from lora_plugins.integrations.lightning.module import check_not_replaced, find_target

_CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}

_BUILD_BEFORE = "Build all layers in __init__ or setup(), and let configure_model() only shard them."


def is_sharded(trainer: Trainer) -> bool:
    """Whether the trainer's strategy splits parameters over processes."""
    return isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy)


def reshard(module: nn.Module) -> None:
    """Splits what a forward without a backward, as that of validation, has left whole: FSDP2's outermost group."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class AdaptBeforeSharding:
    """Adapts a module before its own `configure_model`, which may shard it, if that is possible, and else after it."""

    def __init__(self, module: nn.Module, target: str | None, adapter: str, adapt: Callable[[], None]) -> None:
        self._module, self._target, self._adapter, self._adapt = module, target, adapter, adapt
        self._error: LoraError | None = None
        self._done = False

    def before(self) -> None:
        """Saves the error if layers are missing: `configure_model` may build them."""
        try:
            self._adapt()
            self._done = True
        except ConfigError as error:  # TargetError is one
            self._error = error

    def after(self) -> None:
        """Adapts the module if that was not possible before.

        Raises:
            StateError: If it is sharded by now, or has layers that were built after it was adapted.
        """
        target = find_target(self._module, self._target)
        state = model_state(target)
        if state is None or self._adapter not in state.adapters:
            if self._done:
                raise StateError(
                    f"configure_model() built {self._target!r} again after it was adapted. {_BUILD_BEFORE}"
                )
            check_not_wrapped(target)
            _check_not_sharded(target, self._error)
            if state is not None and self._error is not None:
                raise StateError(
                    f"Before configure_model(), the adapter {self._adapter!r} could not be added as others were: "
                    f"{sentence(self._error)} If layers were missing: {_BUILD_BEFORE}"
                )
            self._adapt()
        check_not_replaced(target, self._adapter)
        _check_none_missed(LoraModel(target), self._adapter)


def take_type_of_precision(target: nn.Module, adapter: str, trainer: Trainer) -> None:
    """Casts an adapter as the trainer is about to cast the module, since sharding takes tensors of one type only.

    A precision like `bf16-true` casts; others leave the adapter alone.
    """
    dtype = _CASTS.get(str(trainer.precision))
    for layer in target.modules() if dtype else ():
        for parameter in adapter_parameters(layer, adapter):
            parameter.data = parameter.data.to(dtype)


def start_as_first(target: nn.Module, adapter: str, trainer: Trainer) -> None:
    """Gives all processes the adapter of the first one, since shards of different draws are no start of an init.

    All processes have to call this together.
    """
    own = [parameter for layer in target.modules() for parameter in adapter_parameters(layer, adapter)]
    first = trainer.strategy.broadcast([parameter.detach().cpu() for parameter in own])
    for parameter, data in zip(own, first, strict=True):
        parameter.data = data.to(parameter.device)


def _check_not_sharded(target: nn.Module, why: object) -> None:
    """Checks that a module which could not be adapted before is not sharded yet.

    Raises:
        StateError: If it is sharded. Adapters that are added now would differ between processes.
    """
    split = [name for name, parameter in target.named_parameters() if isinstance(parameter, DTensor)]
    if split:
        raise StateError(
            f"Before configure_model(), which shards {listing(split, 3)}, the module could not be adapted: "
            f"{sentence(why)} After it, adapters would differ between processes. If layers were missing, build them in "
            "__init__ or setup(), and let configure_model() only shard them."
        )


def check_not_wrapped(target: nn.Module) -> None:
    """Checks that FSDP wrapped no part of a module on its own.

    Raises:
        StateError: If it did, naming the parts.
    """
    parts = [name for name, module in target.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if parts:
        raise StateError(
            f"FSDP wrapped {listing(parts, 3)} on their own, by an auto_wrap_policy or by hand, and layers inside have "
            "other names then. Leave the policy out, or use ModelParallelStrategy (FSDP2), which shards any part."
        )


def _check_none_missed(lora: LoraModel, adapter: str) -> None:
    """Checks that no layer was built after the module was adapted and sharded.

    Raises:
        StateError: If the adapter's configuration fits layers that it does not adapt, naming them.
    """
    plan = lora.plans[adapter]
    missed = {layer.name for layer in LoraModel.plan(lora.model, plan.config).layers} - {x.name for x in plan.layers}
    if missed:
        raise StateError(
            f"configure_model() built {listing(sorted(missed))} after the module was adapted. {_BUILD_BEFORE}"
        )


def check_shardable(target: nn.Module, config: LoraConfig, trainer: Trainer) -> None:
    """Checks that a module can be adapted ahead of sharding.

    Raises:
        StateError: If a tensor is on the meta device, the init does more than start as an identity, or weights
            are stored in fewer bytes.
    """
    empty = [name for name, tensor in (*target.named_parameters(), *target.named_buffers()) if tensor.is_meta]
    if empty:
        raise StateError(
            f"{listing(empty, 3)} are on the meta device, so there is no base yet that could be adapted, and Lightning "
            "would fill adapters with arbitrary values. Load the pretrained weights before fit, in __init__ or setup()."
        )
    name = type(trainer.strategy).__name__
    plan = LoraModel.plan(target, config)
    init = plan.init
    stored = [*plan.stored, *of_all_modules(target, stored_weights), *of_all_modules(target, foreign_weights)]
    if stored:
        raise StateError(
            f"{listing(dict.fromkeys(stored), 3)} are stored in fewer bytes, and cannot be split over processes, as "
            f"{name} does. Leave quantize out, or use strategy='ddp'."
        )
    if init.changes_base:
        raise StateError(f"The init {init.name!r} changes the base, which {name} would not keep. Choose another init.")
    if not init.identity and trainer.state.fn != "fit":
        raise StateError(
            f"With {name} a module is adapted before a checkpoint is read, and the init {init.name!r} is no identity: "
            f"without a checkpoint, {trainer.state.fn} would give results of neither. Use strategy='ddp' here."
        )
