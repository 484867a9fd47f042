"""The adapted targets of a module: the parts that carry adapters, with their layers."""

from torch import nn

from lora_plugins.adapter import Adapter, adapted_layers, adapter_tensors, model_state, present_state
from lora_plugins.inplace import full_name, model_modules, submodule


def adapted_targets(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules below (and including) `module` that carry adapters, by path."""
    return {entry.name: entry.module for entry in model_modules(module) if model_state(entry.module) is not None}


def adapters_by_place(module: nn.Module) -> dict[tuple[str, str], Adapter]:
    """Returns the adapters of all adapted targets, by the path of the target and the adapter's name."""
    return {
        (path, name): adapter
        for path, target in adapted_targets(module).items()
        for name, adapter in present_state(target).adapters.items()
    }


def adapted_weights(module: nn.Module) -> list[str]:
    """Returns the names of the tensors of layers that have adapters."""
    return [
        full_name(path, full_name(name, key))
        for path, target in adapted_targets(module).items()
        for name, layer in adapted_layers(target).items()
        for key, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    ]


def layers_of_factors(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the adapted layer to which each A and B belongs, by the name of the latter in the module."""
    found: dict[str, nn.Module] = {}
    for path, target in adapted_targets(module).items():
        for name in adapter_tensors(target):
            layer = name.rpartition(".")[0].rpartition(".")[0]  # LAYER.lora_A.ADAPTER
            found[full_name(path, name)] = submodule(target, layer)
    return found


def trained_in_place(module: nn.Module) -> set[str]:
    """Returns the names of the parameters that adapters train in place: heads and biases."""
    return {
        full_name(path, name)
        for (path, _), adapter in adapters_by_place(module).items()
        for name in adapter.plan.trained
    }
