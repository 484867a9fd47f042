"""How updates of adapters are combined: a new update, computed from the others.

Everything happens on the updates `scaling * B @ A` themselves, never on A and B apart, so that there are no cross
terms, and adapters of different rank or scaling combine. The new adapter has a scaling of 1.

- `cat`: the weighted sum, exactly, at the sum of the ranks.
- `linear`: the weighted sum, exactly, at no more than the full rank of the layer.
- `svd`: the best approximation of the weighted sum at a rank (`rank`, by default the largest of the adapters).
- `magnitude_prune`: keeps the `density` largest elements of each update, then sums.
- `ties`: the same, then elects a sign for each element and averages those that agree (Yadav et al., arXiv 2306.01708).
- `dare_linear`: keeps each element with probability `density`, rescaled, then sums (Yu et al., arXiv 2311.03099).
- `dare_ties`: as `dare_linear`, then elects signs and averages as `ties` does.

The last four are not of low rank; they are approximated at `rank`, by default the sum of the ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_plugins.errors import ConfigError, near
from lora_plugins.field_checks import check_known_options, finite
from lora_plugins.utils import low_rank

Merge = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]
"""Computes one update `(out, in)` from updates `(n, out, in)`, weights `(n, 1, 1)`, a density and a generator."""


def prune_magnitude(updates: Tensor, density: float) -> Tensor:
    """Keeps the largest elements of each update `(n, out, in)`, a share `density` of them; zero elsewhere."""
    flat = updates.flatten(1)
    keep = int(density * flat.shape[1])
    kept = torch.zeros_like(flat)
    index = flat.abs().topk(keep, dim=1).indices
    return kept.scatter(1, index, flat.gather(1, index)).view_as(updates)


def prune_random(updates: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each element with probability `density` and divides by it, so that the expectation stays."""
    mask = torch.stack([torch.bernoulli(torch.full_like(update, density), generator=generator) for update in updates])
    return updates * mask / density


def elect_and_average(updates: Tensor, weights: Tensor) -> Tensor:
    """Averages, for each element, the weighted updates whose sign is that of the sum of all updates."""
    agrees = updates.sign() == torch.where(updates.sum(0) >= 0, 1.0, -1.0)
    return (updates * weights * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _sum(updates: Tensor, weights: Tensor) -> Tensor:
    return (updates * weights).sum(0)


PRUNED: Mapping[str, Merge] = {
    "magnitude_prune": lambda u, w, density, _: _sum(prune_magnitude(u, density), w),
    "ties": lambda u, w, density, _: elect_and_average(prune_magnitude(u, density), w),
    "dare_linear": lambda u, w, density, generator: _sum(prune_random(u, density, generator), w),
    "dare_ties": lambda u, w, density, generator: elect_and_average(prune_random(u, density, generator), w),
}
"""The combinations that prune the updates first; they take the options `density` and `rank`."""

COMBINATIONS: Mapping[str, tuple[str, ...]] = {
    "cat": (),
    "linear": (),
    "svd": ("rank",),
    **dict.fromkeys(PRUNED, ("density", "rank")),
}
"""The ways to combine, with the options that each takes."""


@dataclass(frozen=True)
class Update:
    """The update `weight * B @ A` of one adapter, its scaling in `B`."""

    A: Tensor
    B: Tensor
    weight: float


def check_options(kind: str, options: Mapping[str, float]) -> None:
    """Checks the name of a combination and its options.

    Raises:
        ConfigError: If there is no such combination or option, or an option has a value that it cannot have.
    """
    if kind not in COMBINATIONS:
        raise ConfigError(f"There is no combination {kind!r}. {near(kind, COMBINATIONS)}")
    known = COMBINATIONS[kind]
    check_known_options(repr(kind), options, known)
    numbers = {key: finite(key, value) for key, value in options.items()}
    if "density" in known and not 0 < numbers.get("density", -1) <= 1:
        raise ConfigError(f"{kind!r} needs a density: the share of elements to keep, above 0 and at most 1.")
    rank = numbers.get("rank", 1)
    if rank < 1 or rank != int(rank):
        raise ConfigError(f"rank is a whole number of at least 1, not {options['rank']!r}.")


def combined_update(
    updates: Sequence[Update], kind: str, options: Mapping[str, float], generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Returns A and B of the new update, and its relative error against the exact combination.

    The updates are in float64. One generator, on the CPU, serves all layers, so that none repeats what another one
    drew.
    """
    A, B = _cat(updates)
    full = min(A.shape[1], B.shape[0])
    if kind == "cat" or (kind == "linear" and A.shape[0] <= full):
        return A, B, 0.0
    exact = B @ A
    if not bool(exact.isfinite().all()):
        return A, torch.full_like(B, math.inf), 0.0  # which is refused by name
    if kind in PRUNED:
        products = torch.stack([update.B @ update.A for update in updates])
        weights = torch.tensor([update.weight for update in updates], dtype=torch.float64, device="cpu").view(-1, 1, 1)
        exact = PRUNED[kind](products.cpu(), weights, options["density"], generator)
    ranks = [len(update.A) for update in updates]
    default = {"linear": full, "svd": max(ranks)}.get(kind, sum(ranks))
    rank = min(int(options.get("rank", default)), full)
    A, B = low_rank(exact, rank, 1.0)
    norm = torch.linalg.matrix_norm(exact)
    return A, B, float(torch.linalg.matrix_norm(B @ A - exact) / norm) if norm else 0.0


def _cat(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Stacks the factors; updates that share one A are added up instead, so that opposite ones cancel exactly."""
    merged: list[tuple[Tensor, Tensor]] = []
    for update in updates:
        B = update.B * update.weight
        same = next((at for at, (A, _) in enumerate(merged) if torch.equal(A, update.A)), None)
        if same is None:
            merged.append((update.A, B))
        else:
            merged[same] = (update.A, merged[same][1] + B)
    return torch.cat([A for A, _ in merged]), torch.cat([B for _, B in merged], dim=1)
