"""Normalization layers with running statistics, which freezing of parameters alone does not keep still."""

import functools
from typing import Any

from torch import nn

from lora_plugins.plugins import class_path

_POWER_ITERATION = "torch.nn.utils.parametrizations._SpectralNorm"
_BASE_CLASS = "_lora_norm_class"
_TRAINING = "_lora_norm_training"


class FrozenNorm(nn.Module):
    """What generated classes of frozen normalization layers have in common."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        """Stays in eval mode, whatever the model around it does; after `thaw` the layer is in the mode asked for."""
        self.__dict__[_TRAINING] = mode
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.__dict__[_BASE_CLASS],), self.__dict__


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
    return type(f"Frozen{base.__name__}", (FrozenNorm, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _rebuild(base: Any) -> nn.Module:
    frozen = _frozen_class(base)
    return frozen.__new__(frozen)
