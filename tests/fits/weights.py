"""The weights that a module computes with."""

from torch import Tensor, nn


def effective(module: nn.Module) -> dict[str, Tensor]:
    """The weights with which layers compute, and all other tensors, under the names of the plain module."""
    found = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if any(mark in name for mark in ("lora_", "parametrizations", "weight_stored")):
            continue
        for key in (*part._parameters, *part._buffers, "weight"):
            tensor = getattr(part, key, None)
            if isinstance(tensor, Tensor) and "lora_" not in key:
                found[f"{name}.{key}".removeprefix(".")] = tensor.detach().clone()
    return found
