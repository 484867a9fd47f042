"""Normalization layers with running statistics, which freezing of parameters alone does not keep still."""

import functools
from typing import Any

from torch import nn

from lora_plugins.plugins import class_path

_POWER_ITERATION = "torch.nn.utils.parametrizations._SpectralNorm"
_BASE_CLASS = "_lora_norm_class"
_TRAINING = "_lora_norm_training"


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stays in eval mode, whatever the model around it does; after `thaw` the layer is in the mode asked for."""
    module.__dict__[_TRAINING] = mode
    base: type[nn.Module] = module.__dict__[_BASE_CLASS]
    return base.train(module, False)


def _keep_statistics(module: nn.Module) -> None:
    """Takes the place of `reset_running_stats`, by which `update_bn` starts: no forward would count them again."""


def _reduce(module: nn.Module, protocol: Any) -> Any:
    return _rebuild, (module.__dict__[_BASE_CLASS],), module.__dict__


def is_frozen(module: nn.Module) -> bool:
    """Whether a normalization layer is kept in eval mode."""
    return _BASE_CLASS in module.__dict__


def own_mode(module: nn.Module) -> bool:
    """Whether a module is in training mode, or would be if it were not kept in eval mode here."""
    return bool(module.__dict__.get(_TRAINING, module.training))


def has_statistics(module: nn.Module) -> bool:
    """Whether a module's forward changes its buffers in training mode: running statistics, or a power iteration."""
    if class_path(module.__dict__.get(_BASE_CLASS, type(module))) == _POWER_ITERATION:
        return True
    return any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())


def freeze(module: nn.Module) -> None:
    """Keeps a normalization layer in eval mode from now on."""
    if _BASE_CLASS in module.__dict__:
        return
    module.__dict__[_BASE_CLASS] = type(module)
    module.__class__ = _frozen_class(module.__dict__[_BASE_CLASS])
    module.train(module.training)


def thaw(module: nn.Module) -> None:
    """Undoes `freeze`: the layer has its own class and its own mode again."""
    if _BASE_CLASS not in module.__dict__:
        return
    module.__class__ = module.__dict__.pop(_BASE_CLASS)
    module.train(module.__dict__.pop(_TRAINING))


@functools.cache
def _frozen_class(base: Any) -> type[nn.Module]:
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, "train": _train, "__reduce_ex__": _reduce}
    if hasattr(base, "reset_running_stats"):
        namespace["reset_running_stats"] = _keep_statistics
    return type(f"Frozen{base.__name__}", (base,), namespace)  # no base beside it, as for adapted layers


def _rebuild(base: Any) -> nn.Module:
    frozen = _frozen_class(base)
    return frozen.__new__(frozen)
