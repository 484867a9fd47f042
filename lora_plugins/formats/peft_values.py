"""Heads, biases and statistics as PEFT has them: whole modules, or biases.

What we train or track by itself, such as the running statistics of a normalization, is written as a whole module, with
the base's own values for the rest of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.places import modules_by_name
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
    if not single:
        return PeftValues(adapter.values, modules, adapter.bias)
    biases = [name for name in single if "bias" in name.rpartition(".")[2]]
    others = [name for name in single if name not in biases]
    # PEFT takes every name with "bias" in it for a bias where it says "all".
    bias = adapter.bias if adapter.bias != "none" or not biases else "all"
    owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in others))
    whole: dict[str, Tensor] = {}
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
        whole |= {f"{owner}.{key}": tensor for key, tensor in module.state_dict().items()}
    return PeftValues({**whole, **adapter.values}, (*modules, *owners), bias)
