"""A change of a model happens whole or not at all, wherever it is stopped: by an error, Ctrl-C or missing memory."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from lora_plugins.adapter.owned_tensors import OwnedTensors
from lora_plugins.adapter.state import MODEL_STATE, ModelState
from lora_plugins.inplace import STATE, LayerState

T = TypeVar("T")

_REACHED = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
"""The dictionaries of a module that changes of ours reach."""

_WRITTEN = (ModelState, OwnedTensors, LayerState)
"""What we know of a model and its layers, as far as it is not frozen."""


def whole(model: nn.Module, change: Callable[[], T]) -> T:
    """Changes a model; where the change does not come to its end, the model is what it was before.

    Args:
        model: The model.
        change: Exchanges values of tensors, and writes into none.

    Returns:
        What the change returns.
    """
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
        modules = list(model.modules())
        self._classes = [(module, module.__class__) for module in modules]
        self._contents = [(content, content.copy()) for module in modules for content in _contents(module)]
        kinds = [kind for module in modules for kind in (module._parameters, module._buffers)]
        tensors = {id(tensor): tensor for kind in kinds for tensor in kind.values() if tensor is not None}
        self._values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors.values()]

    def put_back(self) -> None:
        for content, copy in self._contents:
            content.clear()
            content.update(copy)
        for module, cls in self._classes:
            if module.__class__ is not cls:
                module.__class__ = cls
        for tensor, value, requires_grad in self._values:
            tensor.data = value
            tensor.requires_grad_(requires_grad)


def _contents(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Yields the dictionaries in which a module, and what we know of it, is written down."""
    attributes = vars(module)
    yield attributes
    yield from (attributes[name] for name in _REACHED if isinstance(attributes.get(name), dict))
    for name in (STATE, MODEL_STATE):
        yield from _written(attributes.get(name))


def _written(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, _WRITTEN):
        value = vars(value)
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _written(part)
