"""Heads, biases and statistics as PEFT has them: whole modules, or biases.

What we train or track by itself, such as the running statistics of a normalization, is written as a whole module, with
the base's own values for the rest of it. So is a module that PEFT takes for one of those, by the letters its name ends
with: `layer_norm` where `norm` is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.peft_keys import WRAPPER
from lora_plugins.formats.places import modules_by_name, own_values
from lora_plugins.formats.portable import PortableAdapter


@dataclass(frozen=True)
class PeftValues:
    """What stands beside the adapted layers in a file of PEFT.

    Args:
        tensors: By full name.
        modules: Full names of the modules that `modules_to_save` has to name.
        bias: What `bias` has to say.
    """

    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"


def values_for_peft(adapter: PortableAdapter, model: nn.Module | None) -> PeftValues:
    """Returns what stands beside the adapted layers.

    Raises:
        AdapterFileError: If a value is neither of a module nor a bias, naming it.
    """
    modules = tuple(adapter.saved_modules)
    single = [name for name in adapter.values if not any(name.startswith(f"{module}.") for module in modules)]
    biases = [name for name in single if "bias" in name.rpartition(".")[2]]
    others = [name for name in single if name not in biases]
    # PEFT loads every bias that a file has; of those, "all" lets it train the ones called `bias` (0.21.2).
    bias = adapter.bias if adapter.bias != "none" or not biases else "all"
    owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in others))
    owners = tuple(owner for owner in owners if not _taken_for(owner, modules))
    modules_of = modules_by_name(model) if model is not None else {}
    for owner in owners:
        module = modules_of[owner].module if owner in modules_of else None
        children = any(True for _ in module.children()) if module is not None else True
        if module is None or not owner or owner in adapter.layers or children:
            named = [name for name in others if name.rpartition(".")[0] == owner]
            raise AdapterFileError(
                f"The adapter cannot be written in this format: {listing(named)} was trained by itself, and PEFT "
                "trains whole modules. Name the module in modules_to_save."
            )
    modules = (*modules, *owners)
    return PeftValues({**_values_of_taken(modules, adapter, model), **adapter.values}, modules, bias)


def _values_of_taken(saved: tuple[str, ...], adapter: PortableAdapter, model: nn.Module | None) -> dict[str, Tensor]:
    """Returns the model's values of all modules that PEFT trains in full where it shall train some.

    Raises:
        AdapterFileError: If PEFT could not read them: an adapted module is one of these, or one is inside another.
    """
    tensors = own_values(model) if model is not None else adapter.values
    taken = {name: _taken_for(name.rpartition(".")[0], saved) for name in tensors}
    wrong = [paths[-1] for paths in taken.values() if len(paths) > 1]
    wrong += [name for name in adapter.layers if _taken_for(f"{name}.{WRAPPER}", saved)]
    if wrong:
        raise AdapterFileError(
            "The adapter cannot be written in this format: PEFT trains each module in full whose name ends with the "
            f"letters of {listing(saved)}, and so {listing(dict.fromkeys(wrong))}, which it cannot do where that is "
            "adapted, or in another such module. Rename it."
        )
    return {name: tensors[name] for name, paths in taken.items() if paths}


def _taken_for(module: str, saved: tuple[str, ...]) -> list[str]:
    """Returns the modules, of one and those around it, that PEFT takes for modules that are trained in full."""
    parts = module.split(".")
    return [path for at in range(len(parts)) if (path := ".".join(parts[: at + 1])).endswith(saved)]
