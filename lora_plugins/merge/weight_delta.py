"""What merging adds to each weight, and how much of it rounding takes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.inplace import detached_weight, frozen_statistics, full_name, layer_state, terms_of, weight_key
from lora_plugins.kernels import effective_weight, linear_2d, transposed_product
from lora_plugins.plugins import LayerPlugin, Slot, Term, add_delta, joined, sum_of_deltas
from lora_plugins.utils import common_type, in_float64, in_full, laid_out_like, single_at_least

_SURELY_SMALL = 1e-3
"""Below this bound the loss is not measured, which would take four more passes over the weight."""

NEGLIGIBLE = 1e-6
"""Norm of an update, as a share of that of its weight, below which losing it is no loss.

In float32 and wider types only such updates lose a tenth to rounding, since half a unit in the last place is 6e-8.
"""

_NEARLY_ORTHOGONAL = 1e-3
"""Cosine down to which an inner product in float32 has three digits."""


@dataclass(frozen=True)
class WeightDelta:
    """What is about to be added to one weight.

    Args:
        name: Full name of the weight.
        layer: The layer that has it; one of them, if several share it.
        tensor: Its attribute name there.
        plugin: The plugin whose matrix view the update has.
        weight: The weight that is added to, detached.
        term: The update.
    """

    name: str
    layer: nn.Module
    tensor: str
    plugin: LayerPlugin[Any]
    weight: Tensor
    term: Term

    def effective(self) -> Tensor:
        """Returns the weight with its update: computed in float32 or better, rounded once, in its memory format."""
        term, weight = self.term, self.weight
        matrix = self.plugin.to_matrix(weight)
        with in_full(weight):
            if term.delta is None:
                matrix = effective_weight(matrix, term.A, term.B, term.scaling, weight.dtype)
            else:
                matrix = add_delta(matrix, term.delta)
        return laid_out_like(weight, self.plugin.from_matrix(matrix, weight.shape))

    def relative_error(self) -> float:
        """Returns the share of the update that rounding takes, or a bound of it that is surely small."""
        with in_full(self.weight):
            norm = _norm(self.term)
            if norm == 0:
                return 0.0
            wide = common_type(self.weight.dtype, self.term.A.dtype)
            largest = float(torch.linalg.vector_norm(self.weight.to(wide))) + norm
            kind = torch.finfo(self.weight.dtype)
            # Elements below the smallest normal number, common in float16, are rounded as that one is.
            smallest = kind.smallest_normal * math.sqrt(self.weight.numel())
            bound = kind.eps / 2 * (largest + smallest) / norm
            is_bound = bound <= _SURELY_SMALL and largest <= kind.max  # above it, an element may be rounded to infinity
            return bound if is_bound else _share(self._lost(wide), norm)

    def is_negligible(self) -> bool:
        """Whether the update is so small that nothing is lost with it, as after steps that learned nothing."""
        with in_full(self.weight):
            wide = common_type(self.weight.dtype, self.term.A.dtype)
            return _norm(self.term) <= NEGLIGIBLE * float(torch.linalg.vector_norm(self.weight.to(wide)))

    def _lost(self, wide: torch.dtype) -> float:
        """Returns the norm of what rounding takes."""
        delta = self.plugin.from_matrix(self.term.delta_weight(), self.weight.shape).to(wide)
        return float(torch.linalg.vector_norm((self.effective().to(wide) - self.weight.to(wide)).sub_(delta)))


def weight_deltas(layers: Mapping[str, nn.Module], adapters: tuple[str, ...]) -> Iterator[WeightDelta]:
    """Yields what adapters add to each weight, a tied weight once.

    Adapters that are not active on a layer add nothing there.
    """
    seen: set[object] = set()
    for name, layer in layers.items():
        state = layer_state(layer)
        for tensor in state.weight_names:
            active = [adapter for adapter in adapters if adapter in state.active]
            with frozen_statistics(layer):
                terms = [term for adapter in active for term in terms_of(layer, tensor, adapter)]
            if not terms or place_of(layer, tensor) in seen:
                continue
            seen.add(place_of(layer, tensor))
            plugin = state.adapters[active[0]].plugin
            weight = state.merged[tensor] if tensor in state.merged else detached_weight(layer, tensor)
            with in_full(weight):
                term = joined(terms) or _dense(terms)
            yield WeightDelta(full_name(name, tensor), layer, tensor, plugin, weight, term)


def place_of(layer: nn.Module, tensor: str) -> object:
    """Identifies a weight, the same for all layers that share it."""
    return weight_key(layer, tensor) or (id(layer), tensor)


def _dense(terms: list[Term]) -> Term:
    """Returns one term with the sum of all updates as a matrix."""
    return replace(terms[0], slot=Slot(terms[0].slot.tensor), delta=sum_of_deltas(terms))


def _share(lost: float, norm: float) -> float:
    """Returns `lost / norm`: at most 1, since the untouched weight is as near; beyond it are errors of the norms."""
    return min(lost / norm, 1.0) if math.isfinite(lost) else lost


def _norm(term: Term) -> float:
    """Frobenius norm of an update; that of `scaling * B @ A` from the small products, without forming the matrix.

    `|B A|^2` is the inner product of `B^T B` and `A A^T`. Where they are nearly orthogonal, float32 has too few digits.
    """
    if term.delta is not None:
        return float(torch.linalg.vector_norm(term.delta))
    for widened in (_in_single_at_least, in_float64):
        A, B = widened(term.A), widened(term.B)
        of_A, of_B = linear_2d(A, A), transposed_product(B, B)
        square = float((of_A * of_B).sum())
        if square > _NEARLY_ORTHOGONAL * float(torch.linalg.vector_norm(of_A) * torch.linalg.vector_norm(of_B)):
            break
    return abs(term.scaling) * math.sqrt(max(square, 0.0))


def _in_single_at_least(tensor: Tensor) -> Tensor:
    return tensor.to(single_at_least(tensor.dtype))
