"""Modules that have other values for other rows of a batch, such as a head that each adapter has trained.

For the time of a mixed batch, such a module hands the rows of each adapter to a twin of itself with that adapter's
values. Whoever reads its tensors without calling it would get the base's, and is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.errors import StateError, counted
from lora_plugins.inplace.class_cache import once_for_each_class
from lora_plugins.inplace.described_tensor import DescribedTensor, described
from lora_plugins.inplace.layer_state import copy_in_block, generated_class
from lora_plugins.inplace.modules import NamedModule

_STATE = "_lora_row_twins"
_TYPES = "_lora_row_types"
"""Attribute of the modules of a twin: type and device of each tensor of the model's own when the twin was made."""

Values = Mapping[int, Tensor]
"""Values by the identity of the tensor in whose place they are."""


@dataclass(frozen=True)
class _Twins:
    """What a module holds during a mixed batch.

    Args:
        name: Its full name, for messages.
        plain: A twin with the base's values, of the class that the module has outside of the block.
        each: The rows of each twin, and the twin.
        order: Where each row is once the outputs of all twins follow each other.
    """

    name: str
    plain: nn.Module
    each: tuple[tuple[Tensor, nn.Module], ...]
    order: Tensor


def mix_rows(modules: list[NamedModule], rows: Sequence[str | None], values: Mapping[str | None, Values]) -> None:
    """Gives each row of a batch the values of its adapter, or the base's, in those modules that hold one."""
    mixed = holders(modules, values)
    twins = {name: _twins(name, module, rows, values) for name, module in mixed.items()}
    for name, module in mixed.items():
        names = tuple(_held(module, values))
        module.__dict__[_STATE] = twins[name]
        base: Any = type(module)  # a class can be hashed, though mypy takes `Module.__hash__` for that of its classes
        module.__class__ = _row_class(base, names)


def unmix_rows(module: nn.Module) -> None:
    """Gives a module its own class back; nothing happens to one that has it."""
    if _STATE in module.__dict__:
        plain: Any = module.__dict__.pop(_STATE).plain
        module.__class__ = type(plain)


def holders(modules: list[NamedModule], values: Mapping[str | None, Values]) -> dict[str, nn.Module]:
    """Returns by name the modules that hold a tensor of which an adapter has its own value."""
    return {entry.name: entry.module for entry in modules if _held(entry.module, values)}


def _held(module: nn.Module, values: Mapping[str | None, Values]) -> list[str]:
    """Returns the attribute names of a module's tensors of which an adapter has its own value."""
    return [key for key, tensor in _tensors(module).items() if any(id(tensor) in own for own in values.values())]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _twins(name: str, module: nn.Module, rows: Sequence[str | None], values: Mapping[str | None, Values]) -> _Twins:
    held = {id(tensor) for child in module.modules() for tensor in _tensors(child).values()}
    groups: dict[str | None, list[int]] = {}
    for at, row in enumerate(rows):
        owner = row if held & values.get(row, {}).keys() else None
        groups.setdefault(owner, []).append(at)
    device = next(iter(_tensors(module).values())).device
    with torch.inference_mode(False):
        each = tuple(
            (torch.tensor(places, device=device), _twin(module, values.get(owner, {}), {}))
            for owner, places in groups.items()
        )
        order = torch.tensor([at for places in groups.values() for at in places], device=device).argsort()
    return _Twins(name, _twin(module, {}, {}), each, order)


def _twin(module: nn.Module, values: Values, made: dict[int, nn.Module]) -> nn.Module:
    """Returns a module that shares everything with another one but the tensors that have other values."""
    if id(module) not in made:
        twin = made[id(module)] = type(module).__new__(type(module))
        vars(twin).update(vars(module))  # not by assignment, which the class of stored weights looks into
        for store in ("_parameters", "_buffers"):
            twin.__dict__[store] = {
                key: values.get(id(tensor), tensor) for key, tensor in getattr(module, store).items()
            }
        twin.__dict__[_TYPES] = {name: (tensor.dtype, tensor.device) for name, tensor in _tensors(module).items()}
        twin.__dict__["_modules"] = {
            key: None if child is None else _twin(child, values, made) for key, child in module._modules.items()
        }
    return made[id(module)]


def _run(module: nn.Module, /, *args: Any, **kwargs: Any) -> Tensor:
    """Computes the rows of each twin by its forward; hooks of the module itself act around all of them."""
    twins: _Twins = module.__dict__[_STATE]
    count = len(twins.order)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 1 or not args or args[0] is not tensors[0] or tensors[0].shape[:1] != (count,):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "none"
        raise StateError(
            f"{twins.name!r}, of which adapters have their own values, gets tensors of the shapes {shapes} for a batch "
            f"of {counted(count, 'adapter name')}. It has to get one, with the batch first. Run one batch for each "
            "adapter."
        )
    for _, twin in twins.each:
        for own, part in zip(module.modules(), twin.modules(), strict=True):
            part.training = own.training  # the mode may have changed since the block was entered
            _cast_along(part, own)
    device = tensors[0].device  # the model may have been moved since the block was entered
    outputs = [twin.forward(args[0][index.to(device)], *args[1:], **kwargs) for index, twin in twins.each]
    for (index, _), output in zip(twins.each, outputs, strict=True):
        if not isinstance(output, Tensor) or output.shape[:1] != index.shape:
            raise StateError(
                f"{twins.name!r}, of which adapters have their own values, does not return one tensor with the batch "
                "first. Run one batch for each adapter, with set_adapter."
            )
    return torch.cat(outputs)[twins.order.to(device)]


def _cast_along(part: nn.Module, own: nn.Module) -> None:
    """Casts and moves the values of a twin if the model was cast or moved since the block was entered."""
    types: dict[str, tuple[Any, ...]] = part.__dict__[_TYPES]
    for name, tensor in _tensors(own).items():
        if types[name] != (tensor.dtype, tensor.device):
            types[name] = (tensor.dtype, tensor.device)
            held: dict[str, Any] = part._parameters if name in part._parameters else part._buffers
            held[name] = held[name].to(tensor)


@once_for_each_class
def _row_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    namespace: dict[str, Any] = {name: _refusing(name) for name in names}
    namespace |= {"forward": _run, "extra_repr": _extra_repr, "__reduce_ex__": _reduce}
    return generated_class(f"Rows{base.__name__}", base, namespace)


def _extra_repr(module: nn.Module) -> str:
    twins: _Twins = module.__dict__[_STATE]
    return twins.plain.extra_repr()  # that of the base class may read the tensors


def _reduce(module: nn.Module, protocol: Any) -> Any:
    raise StateError(copy_in_block(module.__dict__[_STATE].name))


def _refusing(name: str) -> property:
    def get(module: nn.Module) -> DescribedTensor:
        return described(
            _tensors(module)[name],
            f"{name!r} of {module.__dict__[_STATE].name!r} is read without calling it, so the rows of a batch cannot "
            "have their adapters' own values of it. Run one batch for each adapter, with set_adapter.",
        )

    return property(get)
