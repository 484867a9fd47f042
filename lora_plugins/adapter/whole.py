"""A change of a model happens whole or not at all, wherever it is stopped: by an error, Ctrl-C or missing memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.adapter.state import MODEL_STATE
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import Content, Contents
from lora_plugins.utils import without_collection

T = TypeVar("T")


def whole(model: nn.Module, change: Callable[[], T]) -> T:
    """Changes a model; where the change does not come to its end, the model is what it was before.

    Args:
        model: The model.
        change: Exchanges values of tensors, and writes into none.

    Returns:
        What the change returns.

    Raises:
        StateError: If tensors of the model were made in inference mode.
    """
    with without_collection():
        before = _Before(model)
    try:
        return change()
    except BaseException:
        before.put_back()
        raise


def check_not_of_inference(model: nn.Module) -> None:
    """Refuses tensors of which torch leaves something broken behind once their value is exchanged.

    Raises:
        StateError: If tensors of the model were made in inference mode, naming them.
    """
    _check(model, _tensors(_modules(model)))


def _check(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    if any(map(_is_of_inference, tensors)):
        named = (*model.named_parameters(), *model.named_buffers())
        names = [name for name, tensor in named if _is_of_inference(tensor)]
        raise StateError(
            f"{listing(names)} were made in inference mode, and torch refuses to change them. Build, load or copy the "
            "model outside of torch.inference_mode(); it may be called inside."
        )


def _is_of_inference(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.is_inference()


class _Before:
    """What a model was: the contents of its modules, the values of its tensors, what we know of it.

    It keeps references, and copies no values.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = _modules(model)
        self._contents = Contents(modules, [model._forward_pre_hooks, *_known(modules)])
        tensors = _tensors(modules)
        _check(model, tensors)
        self._values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]

    def put_back(self) -> None:
        self._contents.put_back()
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


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    kinds = (kind for module in modules for kind in (module._parameters, module._buffers))
    return [tensor for kind in kinds for tensor in kind.values() if tensor is not None]


def _known(modules: list[nn.Module]) -> Iterator[Content]:
    """Yields the dictionaries in which is written down what we know of models."""
    for module in modules:
        if (state := vars(module).get(MODEL_STATE)) is not None:
            values = state.values
            yield from (vars(state), state.adapters, state.kept, state.requires_grad, state.guards)
            yield from (vars(values), values.base, values.owner, values.values, *values.values.values())
