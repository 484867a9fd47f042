"""Whether the base of an adapter still is what it was: layers move buffers, and others write into frozen weights."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_plugins.adapter.state import ModelState, model_state
from lora_plugins.inplace import model_modules, own_tensors, persistent_buffers
from lora_plugins.plan import Plan
from lora_plugins.utils import FINGERPRINT, fingerprint

_MOST = 2**16
"""Elements of a tensor that are looked at, evenly spaced."""

_SHARE = 1e-3
"""How much a tensor may differ, as a share of its norm: casts and averages of equal values round."""

_ROUNDING = 16
"""The same in units in the last place, where these are large."""


def base_fingerprints(model: nn.Module, plan: Plan) -> dict[str, dict[str, float]]:
    """Returns fingerprints of the base's tensors that the adapter is saved without, by name.

    Statistics of norms that stand still are not among them, and neither are tensors whose values are not here, or that
    another library keeps in a type of its own.
    """
    state = model_state(model)
    values = state.values if state else None
    return {
        name: fingerprint(_sample(values.base_value(model, name) if values else tensor))
        for name, tensor in _left_to_the_base(model, plan)
    }


def moved_base(model: nn.Module, state: ModelState, adapter: str) -> list[str]:
    """Returns the names of tensors that have changed since an adapter was added, and that it does not hold."""
    before, plan = state.adapters[adapter].base, state.adapters[adapter].plan
    now = base_fingerprints(model, plan) if before else {}
    tensors = dict(_left_to_the_base(model, plan))
    return [name for name in now if name in before and _differ(before[name], now[name], _share(tensors[name]))]


def _left_to_the_base(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    modules = model_modules(model)
    still = set(plan.frozen_norms)
    buffers = {n: t for n, t in persistent_buffers(modules).items() if n.rpartition(".")[0] not in still}
    for name, tensor in (own_tensors(modules, "_parameters") | buffers).items():
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if is_plain and name not in plan.trained and name not in plan.saved_buffers:
            yield name, tensor


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    some = flat[:: -(-flat.numel() // _MOST) or 1]
    return (torch.view_as_real(some) if some.is_complex() else some).double().nan_to_num()


def _share(tensor: Tensor) -> float:
    """How much a tensor may differ; one of integers not at all."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return max(_SHARE, _ROUNDING * torch.finfo(tensor.dtype).eps)


def _differ(before: Mapping[str, float], now: Mapping[str, float], share: float) -> bool:
    scale = share * max(before["norm"], now["norm"])
    return any(abs(before[key] - now[key]) > scale for key in FINGERPRINT)
