"""The modules of a model by name, with the other names that shared modules and tied tensors have."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.utils import INSERTED, plain_name

Value = TypeVar("Value")

FOREIGN = frozenset({("torchmetrics.metric", "Metric")})
"""Classes whose modules do not belong to the model: a metric's own network is neither adapted nor frozen."""


@dataclass(frozen=True)
class NamedModule:
    """One module of a model.

    Args:
        name: Its first name, as `named_modules` gives it, except for what `torch.compile` and its like insert.
        module: The module.
        aliases: Its other names, where it stands in the model more than once.
    """

    name: str
    module: nn.Module
    aliases: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names, the first one first."""
        return (self.name, *self.aliases)


def model_modules(model: nn.Module) -> list[NamedModule]:
    """Lists the modules of a model, each once, in order.

    Adapters, modules that are not the model's, and those that `torch.compile` and its like insert are not among them.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    left_out: tuple[type[nn.Module], ...] = (AdapterTensors, *_foreign())
    waiting = [("", model)]
    while waiting:  # a function inside this one that calls itself would keep the model until the collector comes
        name, module = waiting.pop()
        module = unwrapped(module)
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
        children = [(full_name(name, key), child) for key, child in module._modules.items() if child is not None]
        waiting += [entry for entry in reversed(children) if not isinstance(entry[1], left_out)]
    return [NamedModule(names[key][0], module, tuple(names[key][1:])) for key, module in modules.items()]


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside wrappers such as that of `torch.compile`; most have none."""
    for name, cls in INSERTED.items():  # a forward asks: torch.compile of 2.8 cannot trace `next` of a generator
        if name in module._modules and any(base.__name__ == cls for base in type(module).__mro__):
            return unwrapped(cast(nn.Module, module._modules[name]))
    return module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of that name, with or without the components that `torch.compile` and its like insert.

    Raises:
        AttributeError: If there is none.
    """
    module = unwrapped(model)
    for part in filter(None, name.split(".")):
        if part in module._modules:
            module = unwrapped(cast(nn.Module, module._modules[part]))
        elif part not in INSERTED:
            raise AttributeError(f"{type(model).__name__} has no module {name!r}: {part!r} is not there.")
    return module


def _foreign() -> list[type[nn.Module]]:
    """Returns the foreign classes whose packages are imported; of the others there are no modules."""
    found = (getattr(sys.modules.get(package), name, None) for package, name in FOREIGN)
    return [cls for cls in found if cls is not None]


def full_name(module: str, key: str) -> str:
    """Returns the full name of what a module holds; that of the model itself is empty."""
    return f"{module}.{key}" if module else key


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Returns what `model_modules` lists, under all of its names."""
    return {name: entry.module for entry in model_modules(model) for name in entry.names}


def of_all_modules(model: nn.Module, own: Callable[[nn.Module], Mapping[str, Value]]) -> dict[str, Value]:
    """Returns by full name what all modules of a model have as their `own`, each under its first name."""
    return {
        full_name(entry.name, name): value
        for entry in model_modules(model)
        for name, value in own(entry.module).items()
    }


def named_parameters(module: nn.Module, aliases: bool = False) -> dict[str, nn.Parameter]:
    """Returns all parameters below a module, those of adapters too, by full name without what is inserted.

    The names are torch's own, as those of a state dict are: the module's class may have a method of that name. With
    `aliases`, a tied parameter is there under all of its names, and not only under the first.
    """
    named = nn.Module.named_parameters(module, remove_duplicate=not aliases)
    return {plain_name(name): tensor for name, tensor in named}


def named_tensors(module: nn.Module, aliases: bool = False) -> dict[str, Tensor]:
    """Returns all parameters and buffers below a module, as `named_parameters` does."""
    buffers = nn.Module.named_buffers(module, remove_duplicate=not aliases)
    return {**named_parameters(module, aliases), **{plain_name(name): tensor for name, tensor in buffers}}


def own_parameters(modules: list[NamedModule]) -> dict[str, Tensor]:
    """Returns the model's own parameters by full name, a tied one under its first name only."""
    return _named_once({entry.name: entry.module._parameters for entry in modules})


def own_buffers(modules: list[NamedModule]) -> dict[str, Tensor]:
    """Returns the model's own buffers, as `own_parameters` does."""
    return _named_once({entry.name: entry.module._buffers for entry in modules})


def _named_once(held: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module, tensors in held.items():
        for key, tensor in tensors.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[full_name(module, key)] = tensor
    return found


def persistent_buffers(modules: list[NamedModule]) -> dict[str, Tensor]:
    """Returns the buffers that a state dict has, by full name."""
    keys = {
        full_name(entry.name, key)
        for entry in modules
        for key in entry.module._buffers.keys()  # noqa: SIM118  # a TorchScript module cannot be iterated over
        if key not in entry.module._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in own_buffers(modules).items() if name in keys}


def holder_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that owns a parameter or buffer, and its name there.

    Raises:
        AttributeError: If there is no such module.
    """
    path, _, key = name.rpartition(".")
    try:
        return submodule(model, path), key
    except AttributeError:
        for entry in model_modules(model):  # TensorDictParams of tensordict gives its tensors names with dots
            nested = name.removeprefix(full_name(entry.name, ""))
            if nested in entry.module._parameters or nested in entry.module._buffers:
                return entry.module, nested
        raise


def own_tensor(model: nn.Module, name: str) -> Tensor:
    """Returns the parameter or buffer of that full name.

    Raises:
        StateError: If there is none any more.
    """
    tensor = found_tensor(model, name)
    if tensor is None:
        raise StateError(
            f"{name!r} is gone since the model was adapted: the layer was replaced, pruned or parametrized. Put it "
            "back, as by prune.remove or remove_parametrizations, or unload() the adapters, which leaves the new layer "
            "as it is, and adapt the model again."
        )
    return tensor


def found_tensor(model: nn.Module, name: str) -> Tensor | None:
    """Returns the parameter or buffer of that full name, if there is one."""
    try:
        module, key = holder_of(model, name)
    except AttributeError:  # the module that held it is gone too
        return None
    kinds = (module._parameters, module._buffers)
    found = (kind[key] for kind in kinds if key in kind)  # not `get`, which a TorchScript module does not have
    return next((tensor for tensor in found if tensor is not None), None)
