"""Whether the base has changed since an adapter was added: layers update buffers, and other code writes weights."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_plugins.adapter.state import ModelState, model_state
from lora_plugins.inplace import model_modules, own_parameters, persistent_buffers
from lora_plugins.plan import Plan
from lora_plugins.utils import is_dense

Mark = tuple[float, float]
"""The norm of a tensor, and its product with random numbers, which a change of it changes by about its own norm."""

_MOST = 2**16
"""Elements of a tensor that are looked at, evenly spaced."""

_SHARE = 1e-3
"""How much a tensor may differ, as a share of its norm: casts and averages of equal values round."""

_ROUNDING = 16
"""The same in units in the last place, where these are large."""


def base_marks(model: nn.Module, plan: Plan) -> dict[str, Mark]:
    """Returns by name a mark of each tensor of the base that is not saved with the adapter.

    Statistics of frozen norms are not among them, and neither are tensors whose values are not here, or that
    another library keeps in a type of its own.
    """
    return {name: _mark(value) for name, value in _left_to_the_base(model, plan)}


def moved_base(model: nn.Module, state: ModelState, adapter: str) -> list[str]:
    """Returns the names of tensors that have changed since an adapter was added and are not saved with it."""
    before = state.adapters[adapter].base
    left = _left_to_the_base(model, state.adapters[adapter].plan) if before else ()
    return [name for name, value in left if name in before and _differ(before[name], _mark(value), _share(value))]


def _left_to_the_base(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yields the base's values by name, including those for which an adapter has its own."""
    modules, state = model_modules(model), model_state(model)
    still, saved = set(plan.frozen_norms), set(plan.saved_in_place)
    buffers = {n: t for n, t in persistent_buffers(modules).items() if n.rpartition(".")[0] not in still}
    for name, tensor in (own_parameters(modules) | buffers).items():
        is_plain = type(tensor) in (Tensor, nn.Parameter) and is_dense(tensor)
        if is_plain and name not in saved:
            yield name, state.values.base_value(model, name) if state else tensor


def _mark(tensor: Tensor) -> Mark:
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().flatten()
    some = flat[:: -(-flat.numel() // _MOST) or 1].cpu().to(torch.float64).nan_to_num()
    return float(some.norm()), float(some @ _random_numbers()[: len(some)])


@functools.cache
def _random_numbers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_MOST, dtype=torch.float64, device="cpu", generator=generator)


def _share(tensor: Tensor) -> float:
    """Returns by how much a tensor may differ; integers must be equal."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return max(_SHARE, _ROUNDING * torch.finfo(tensor.dtype).eps)


def _differ(before: Mark, now: Mark, share: float) -> bool:
    scale = share * max(before[0], now[0])
    return any(abs(its - own) > scale for its, own in zip(before, now, strict=True))
