"""Heads, biases and statistics as PEFT has them: whole modules, or biases.

What we train or track by itself, such as the running statistics of a normalization, is written as a whole module, with
the base's own values for the rest of it. So is a module that PEFT takes for one of those, by the letters its name ends
with: `layer_norm` where `norm` is trained.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.peft_keys import WRAPPER
from lora_plugins.formats.places import own_values, places_by_name, tensor_names
from lora_plugins.formats.portable import PortableAdapter
from lora_plugins.inplace import NamedModule
from lora_plugins.utils import path_starts, within

_FACTORS = ("lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_INSIDE = (WRAPPER, *_FACTORS, *(f"{factor}.default" for factor in _FACTORS))
"""The modules in what PEFT puts around an adapted layer, whose names it compares as well."""

_PARAMETERS = (nn.ParameterDict, nn.ParameterList)
"""What holds single parameters, and computes nothing."""


@dataclass(frozen=True)
class PeftValues:
    """The values beside the adapted layers in a file of PEFT.

    Args:
        tensors: By full name.
        modules: Full names of the modules that `modules_to_save` has to name.
        bias: What `bias` has to say.
    """

    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"


def values_for_peft(adapter: PortableAdapter, model: nn.Module | None) -> PeftValues:
    """Returns the values beside the adapted layers.

    Raises:
        AdapterFileError: If a value is neither of a module nor a bias, naming it.
    """
    modules_of = places_by_name(model) if model is not None else {}
    modules = tuple(_that_peft_can_wrap(adapter.saved_modules, modules_of))
    values = _by_each_name(adapter.values, model)
    saved = set(modules)
    single = [name for name in values if not within(name, saved)]
    biases = [name for name in single if "bias" in name.rpartition(".")[2]]
    others = [name for name in single if name not in biases]
    # PEFT loads every bias that a file has; of those, "all" lets it train the ones called `bias` (0.21.2).
    bias = adapter.bias if adapter.bias != "none" or not biases else "all"
    owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in others))
    owners = tuple(owner for owner in owners if not _taken_for(owner, modules))
    for owner in owners:
        module = modules_of[owner].module if owner in modules_of else None
        inside = module is None or any(child.state_dict() for child in module.children())
        if not owner or owner in adapter.layers or inside or isinstance(module, _PARAMETERS):
            named = [name for name in others if name.rpartition(".")[0] == owner]
            raise AdapterFileError(
                f"The adapter cannot be written in this format: {listing(named)} was trained by itself, and PEFT "
                "trains whole modules. Name the module in modules_to_save."
            )
    modules = (*modules, *owners)
    return PeftValues({**_values_of_taken(modules, adapter, model), **values}, modules, bias)


def _that_peft_can_wrap(names: Iterable[str], modules: Mapping[str, NamedModule]) -> Iterator[str]:
    """Yields the modules that are trained in full; PEFT can wrap the members of containers, but no containers."""
    for name in names:
        module = modules[name].module if name in modules else None
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            yield from _that_peft_can_wrap([f"{name}.{child}" for child, _ in module.named_children()], modules)
        elif not isinstance(module, _PARAMETERS):
            yield name


def _by_each_name(values: Mapping[str, Tensor], model: nn.Module | None) -> Mapping[str, Tensor]:
    """Returns values by all names of their tensors, since PEFT gives each module that it trains a copy of its own."""
    if model is None:
        return values
    return {name: values[first] for name, first in tensor_names(model).items() if first in values}


def _values_of_taken(saved: tuple[str, ...], adapter: PortableAdapter, model: nn.Module | None) -> dict[str, Tensor]:
    """Returns the model's values of all modules that PEFT trains in full when it is told to train `saved`.

    Raises:
        AdapterFileError: If PEFT could not read them: an adapted module is one of these, or one is inside another.
    """
    tensors = own_values(model) if model is not None else adapter.values
    taken = {name: _taken_for(name.rpartition(".")[0], saved) for name in tensors}
    wrong = [paths[-1] for paths in taken.values() if len(paths) > 1]
    wrong += [name for name in adapter.layers if any(_taken_for(f"{name}.{each}", saved) for each in _INSIDE)]
    if wrong:
        raise AdapterFileError(
            "The adapter cannot be written in this format: PEFT trains every module in full whose name ends with the "
            f"letters of {listing(saved)}, and so {listing(dict.fromkeys(wrong))}. It cannot do that to a module that "
            "is adapted, or inside another such module. Rename it."
        )
    return {name: tensors[name] for name, paths in taken.items() if paths}


def _taken_for(module: str, saved: tuple[str, ...]) -> list[str]:
    """Returns those of a module and its parents that PEFT takes for modules to train in full."""
    return [path for path in reversed(path_starts(module)) if path.endswith(saved)]
