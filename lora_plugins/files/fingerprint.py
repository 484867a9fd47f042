"""A fingerprint of a base weight: enough to notice that an adapter is put on another model."""

import functools
import hashlib
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.inplace import detached_weight, full_name, is_shard, stored_weight, submodule
from lora_plugins.plan import Plan
from lora_plugins.utils import in_float64, version

TOLERANCE = 1e-2
"""Distance, relative to the norm, up to which two weights count as the same: rounding to bfloat16 is below it."""

KEYS = ("norm", "dot0", "dot1", "dot2", "dot3")
"""What a fingerprint holds."""

_PERIOD = 4093
_ROWS = 64
"""Periods that are read at a time: 2 MB of float64."""


def fingerprint(weight: Tensor) -> dict[str, float]:
    """Returns the norm of a weight of any shape, and its dot products with four fixed vectors of random signs.

    Two independent weights differ in each product by about 1.4 times their norm, so one of them agrees within the
    tolerance by chance in 1 of 180 cases, and all four in 1 of 10⁹.
    """
    # In parts, since each is made wider: of a large weight as a whole, most of the time went into new memory.
    flat = weight.detach().flatten()
    parts = map(in_float64, flat.split(_PERIOD * _ROWS))  # type: ignore[no-untyped-call]
    squares, sums = zip(*((part @ part, _sums(part)) for part in parts), strict=True)
    norm = functools.reduce(torch.add, squares).sqrt()
    dots = (_signs() * functools.reduce(torch.add, sums).cpu()).sum(1).tolist()
    return dict(zip(KEYS, (float(norm), *dots), strict=True))


def _sums(flat: Tensor) -> Tensor:
    """Adds up the elements that get the same sign, as the signs repeat."""
    return F.pad(flat, (0, -len(flat) % _PERIOD)).view(-1, _PERIOD).sum(0)


@functools.cache
def _signs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (len(KEYS) - 1, _PERIOD), device="cpu", generator=generator).to(torch.float64) * 2 - 1


def same(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether two fingerprints can be those of one weight, up to rounding to half precision."""
    scale = TOLERANCE * max(first["norm"], second["norm"])
    return all(abs(first[key] - second[key]) <= scale for key in KEYS)


def fingerprints(
    model: nn.Module, plan: Plan, taken: dict[str, tuple[object, dict[str, float]]] | None = None
) -> dict[str, dict[str, float]]:
    """Returns the fingerprints of the untouched weights that a plan adapts, by full name.

    The model has the base's values in place. Stored weights have none: of them there are checksums.

    Those that were taken before are in `taken`, each with what tells whether its weight was written since, and new ones
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
    """Returns a value that stays equal until somebody writes into a weight; for a computed weight it never is."""
    parameter = layer._parameters.get(tensor)
    if parameter is None:
        parameter = _normalized(layer, tensor)
    return object() if parameter is None else (id(parameter), version(parameter))


def _marked(layer: nn.Module, tensor: str) -> Tensor:
    """Returns the tensor that identifies a layer: its weight, or what spectral norm computes it from."""
    source = _normalized(layer, tensor)
    return detached_weight(layer, tensor) if source is None else source.detach()


def _normalized(layer: nn.Module, name: str) -> nn.Parameter | None:
    """Returns the parameter that spectral norm computes a weight from, by a hook or by a parametrization of torch.

    The weight itself does not identify a layer: it depends on statistics that training moves, and a hook computes it at
    the next forward only.
    """
    original = layer._parameters.get(f"{name}_orig")
    if original is not None:
        return original if f"{name}_u" in layer._buffers else None
    parametrizations = layer._modules.get("parametrizations")
    found = getattr(parametrizations, name, None)
    if found is None or not any(buffer.rpartition(".")[2] == "_u" for buffer, _ in found.named_buffers()):
        return None
    return cast("nn.Parameter | None", found._parameters.get("original"))


def checksum(tensor: Tensor) -> str:
    """Returns the type of a tensor and the SHA-256 of its bits."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def has_checksum(tensor: Tensor, expected: str) -> bool:
    """Whether a tensor has that checksum in its type; the model may have been cast since (`bf16-true`)."""
    dtype = getattr(torch, expected.partition(":")[0], None)
    return isinstance(dtype, torch.dtype) and checksum(tensor.to(dtype)) == expected
