"""A fingerprint of a base weight: enough to notice that an adapter is put on another model."""

import hashlib

import torch
from torch import Tensor, nn

from lora_plugins.inplace import detached_weight, full_name, is_shard, normalized_parameter, stored_weight, submodule
from lora_plugins.plan import Plan
from lora_plugins.utils import FINGERPRINT, fingerprint, version

TOLERANCE = 1e-2
"""Distance, relative to the norm, up to which two weights count as the same: rounding to bfloat16 is below it."""


def same(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether two fingerprints can be those of one weight, up to rounding to half precision."""
    scale = TOLERANCE * max(first["norm"], second["norm"])
    return all(abs(first[key] - second[key]) <= scale for key in FINGERPRINT)


def fingerprints(
    model: nn.Module, plan: Plan, taken: dict[str, tuple[object, dict[str, float]]] | None = None
) -> dict[str, dict[str, float]]:
    """Returns the fingerprints of the untouched weights that a plan adapts, by full name.

    Stored weights have none: of them there are checksums.

    Args:
        model: The model, with the base's values in place.
        plan: What is adapted.
        taken: Fingerprints that were taken before, each with what tells whether its weight was written since; new ones
            are put there. Of a weight that is split over processes, the one from before always counts.
    """
    taken = {} if taken is None else taken
    found = {}
    for layer in plan.layers:
        module = submodule(model, layer.name)
        for tensor in dict.fromkeys(slot.tensor for slot in layer.slots):
            name = full_name(layer.name, tensor)
            if name in plan.stored or stored_weight(module, tensor) is not None:
                continue
            stamp = _stamp(module, tensor)
            if name not in taken or (taken[name][0] != stamp and not is_shard(module, tensor)):
                taken[name] = stamp, fingerprint(_marked(module, tensor))
            found[name] = taken[name][1]
    return found


def _stamp(layer: nn.Module, tensor: str) -> object:
    """Returns what is the same as long as nobody writes into a weight; nothing is, where the weight is computed."""
    parameter = layer._parameters.get(tensor)
    if parameter is None:
        parameter = normalized_parameter(layer, tensor)
    return object() if parameter is None else (id(parameter), version(parameter))


def _marked(layer: nn.Module, tensor: str) -> Tensor:
    """Returns the tensor by which a layer is known: its weight, or what spectral norm computes it from."""
    source = normalized_parameter(layer, tensor)
    return detached_weight(layer, tensor) if source is None else source.detach()


def checksum(tensor: Tensor) -> str:
    """Returns the type of a tensor and the SHA-256 of its bits."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def has_checksum(tensor: Tensor, expected: str) -> bool:
    """Whether a tensor is the one of that sum, once it is cast as the model may have been since (`bf16-true`)."""
    dtype = getattr(torch, expected.partition(":")[0], None)
    return isinstance(dtype, torch.dtype) and checksum(tensor.to(dtype)) == expected
