"""A change of a model happens whole or not at all, wherever it is stopped: by an error, Ctrl-C or missing memory."""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.jit import ScriptModule

from lora_plugins.adapter.state import MODEL_STATE
from lora_plugins.inplace import STATE, AdapterTensors
from lora_plugins.utils import without_collection

T = TypeVar("T")


def whole(model: nn.Module, change: Callable[[], T]) -> T:
    """Changes a model; where the change does not come to its end, the model is what it was before.

    Args:
        model: The model.
        change: Exchanges values of tensors, and writes into none.

    Returns:
        What the change returns.
    """
    with without_collection():
        before = _Before(model)
    try:
        return change()
    except BaseException:
        before.put_back()
        raise


class _Before:
    """What a model was: the classes and attributes of its modules, the values of its tensors, what we know of it.

    It keeps references, and copies no values.
    """

    def __init__(self, model: nn.Module) -> None:
        self._collecting = gc.isenabled()
        modules = _modules(model)
        self._classes = [(module, module.__class__) for module in modules]
        self._contents = [(content, content.copy()) for module in modules for content in _contents(module)]
        self._contents.append((model._forward_pre_hooks, model._forward_pre_hooks.copy()))
        tensors = [tensor for module in modules for tensor in _tensors(module)]
        self._values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]

    def put_back(self) -> None:
        if self._collecting:
            gc.enable()
        for content, copy in self._contents:
            content.clear()
            content.update(copy)
        for module, cls in self._classes:
            if module.__class__ is not cls:
                module.__class__ = cls
        for tensor, value, requires_grad in self._values:
            tensor.data = value
            if tensor.requires_grad != requires_grad:  # torch 2.8 refuses any call on a parameter without a shape
                tensor.requires_grad_(requires_grad)


def _modules(model: nn.Module) -> list[nn.Module]:
    """Lists a module and those below it; in no order, and faster than `modules()`."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor for kind in (module._parameters, module._buffers) for tensor in kind.values() if tensor is not None]


def _contents(module: nn.Module) -> list[dict[Any, Any]]:
    """Returns the dictionaries in which a module, and what we know of it, is written down."""
    if isinstance(module, AdapterTensors):
        return [module._parameters]
    if isinstance(module, ScriptModule):  # is never adapted, and has no dictionaries of Python
        return []
    attributes = vars(module)
    found: list[dict[Any, Any]] = [attributes, module._modules, module._parameters, module._load_state_dict_pre_hooks]
    if module._buffers:
        found.append(module._buffers)
    if (layer := attributes.get(STATE)) is not None:
        found += [vars(layer), layer.adapters, layer.merged]
    if (state := attributes.get(MODEL_STATE)) is not None:
        values = state.values
        found += [vars(state), state.adapters, state.kept, state.requires_grad, state.guards]
        found += [vars(values), values.base, values.owner, values.values, *values.values.values()]
    return found
