"""Normalization layers with running statistics, which go on changing when only parameters are frozen."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lora_plugins.inplace.class_cache import once_for_each_class
from lora_plugins.inplace.layer_state import base_class_of, constructor, generated_class, remade
from lora_plugins.plugins import class_path

_POWER_ITERATION = "torch.nn.utils.parametrizations._SpectralNorm"
_BASE_CLASS = "_lora_norm_class"
_TRAINING = "_lora_norm_training"


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stays in eval mode, whatever the model around it does; after `thaw` the layer is in the mode asked for.

    What is inside of it follows the model.
    """
    module.__dict__[_TRAINING] = mode
    base: type[nn.Module] = module.__dict__[_BASE_CLASS]
    base.train(module, mode)
    module.training = False
    return module


def _keep_statistics(module: nn.Module) -> None:
    """Takes the place of `reset_running_stats`, by which `update_bn` starts: no forward would count them again."""


def _reduce(module: Any, protocol: Any) -> Any:
    base: Any = module.__dict__[_BASE_CLASS]
    state = {key: value for key, value in module.__getstate__().items() if key != _BASE_CLASS}
    if "__reduce_ex__" in base.__dict__:  # a generated class has no import path either
        make, arguments, _ = base.__reduce_ex__(module, protocol)
        return _rebuild, (make, arguments), state
    return _rebuild, (base.__new__, (base,)), state


def is_frozen(module: nn.Module) -> bool:
    """Whether a normalization layer is kept in eval mode."""
    return _BASE_CLASS in module.__dict__


def own_mode(module: nn.Module) -> bool:
    """Whether a module is in training mode, or would be if it were not kept in eval mode here."""
    return bool(module.__dict__.get(_TRAINING, module.training))


def set_own_mode(module: nn.Module, mode: bool) -> None:
    """Puts a module, and not what is in it, into a mode: now, or if it is kept in eval mode here, after `thaw`."""
    if is_frozen(module):
        module.__dict__[_TRAINING], module.training = mode, False
    else:
        module.training = mode


def has_statistics(module: nn.Module) -> bool:
    """Whether a module's forward changes its buffers in training mode: running statistics, or a power iteration."""
    if class_path(base_class_of(module)) == _POWER_ITERATION:
        return True
    return any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())


def freeze(module: nn.Module) -> None:
    """Keeps a normalization layer in eval mode from now on."""
    if is_frozen(module):
        return
    module.__dict__[_BASE_CLASS] = type(module)
    set_class(module, type(module))
    module.__dict__[_TRAINING], module.training = module.training, False


def thaw(module: nn.Module) -> None:
    """Undoes `freeze`: the layer has its own class and its own mode again."""
    if not is_frozen(module):
        return
    base: Any = module.__dict__.pop(_BASE_CLASS)
    cls: Any = type(module)
    generated: Any = _frozen_class(base)
    module.__class__ = remade(cls, generated, base)
    module.training = module.__dict__.pop(_TRAINING)


def set_class(module: nn.Module, cls: Any) -> None:
    """Gives a module another class; one that is kept in eval mode stays so."""
    if is_frozen(module):
        module.__dict__[_BASE_CLASS] = cls
        cls = _frozen_class(cls)
    module.__class__ = cls


@once_for_each_class
def _frozen_class(base: Any) -> type[nn.Module]:
    namespace: dict[str, Any] = {"__init__": constructor(base), "train": _train, "__reduce_ex__": _reduce}
    if hasattr(base, "reset_running_stats"):
        namespace["reset_running_stats"] = _keep_statistics
    return generated_class(f"Frozen{base.__name__}", base, namespace)


def _rebuild(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    base: Any = type(module)
    module.__dict__[_BASE_CLASS] = base
    object.__setattr__(module, "__class__", _frozen_class(base))  # that of modules needs their tables
    return module
