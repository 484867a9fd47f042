"""Changes a model as a whole or not at all, wherever it is stopped: by an error, Ctrl-C or a lack of memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.adapter.state import MODEL_STATE
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import Content, Contents
from lora_plugins.utils import without_collection

T = TypeVar("T")


def whole(model: nn.Module, change: Callable[[], T]) -> T:
    """Changes a model; where the change does not come to its end, the model is what it was before.

    The change exchanges values of tensors, and writes into none: references to them are kept, and no copies. What it
    returns is returned.

    Raises:
        StateError: If parameters of the model were made in inference mode.
    """
    with without_collection():
        modules = leave_inference(model)
        contents = Contents(modules, [model._forward_pre_hooks, *_known(modules)])
        before = [(tensor, tensor.data, tensor.requires_grad) for tensor in _tensors(modules)]
    try:
        return change()
    except BaseException:
        contents.put_back()
        for tensor, value, requires_grad in before:
            tensor.data = value
            if tensor.requires_grad != requires_grad:  # torch 2.8 refuses any call on a parameter without a shape
                tensor.requires_grad_(requires_grad)
        raise


def leave_inference(model: nn.Module) -> list[nn.Module]:
    """Prepares a model for exchanging values of its tensors, which breaks tensors of inference mode.

    A forward in inference mode may leave buffers, such as a mask that a module keeps for the next batch: these are
    replaced by ordinary tensors. Returns the modules of the model.

    Raises:
        StateError: If parameters of the model were made in inference mode, naming them.
    """
    modules = _modules(model)
    if any(_is_of_inference(tensor) for module in modules for tensor in _present(module._parameters)):
        names = [name for name, parameter in model.named_parameters() if _is_of_inference(parameter)]
        raise StateError(
            f"{listing(names)} were made in inference mode, and torch refuses to change them. Build, load or copy the "
            "model outside of torch.inference_mode(); it may be called inside."
        )
    kept = [
        (module._buffers, name, buffer)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and _is_of_inference(buffer)
    ]
    renewed: dict[Tensor, Tensor] = {}  # one that several modules share stays one
    with torch.inference_mode(False):
        for buffers, name, buffer in kept:
            buffers[name] = renewed.setdefault(buffer, buffer.clone())
    return modules


def _is_of_inference(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.is_inference()


def _modules(model: nn.Module) -> list[nn.Module]:
    """Lists a module and those below it; in no order, and faster than `modules()`."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    kinds = (kind for module in modules for kind in (module._parameters, module._buffers))
    return [tensor for kind in kinds for tensor in _present(kind)]


def _present(tensors: Mapping[str, Tensor | None]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors.values() if tensor is not None)


def _known(modules: list[nn.Module]) -> Iterator[Content]:
    """Yields the dictionaries that hold what we know about models."""
    for module in modules:
        if (state := vars(module).get(MODEL_STATE)) is not None:
            values = state.values
            yield from (vars(state), state.adapters, state.requires_grad, state.guards)
            yield from (vars(values), values.base, values.owner, values.values, *values.values.values())
