"""Combination of adapters: a new adapter whose update is computed from the updates of others.

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
Trained heads and biases are combined by the weighted sum of their differences from the base.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_plugins.adapter.content import SlotTensors, factor_dtype
from lora_plugins.adapter.integrity import check_in_place
from lora_plugins.adapter.state import ModelState
from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, StateError, listing, near
from lora_plugins.field_checks import finite
from lora_plugins.inplace import detached_weight, factors, full_name, own_tensor, submodule
from lora_plugins.plan import Plan, exact_expression, exact_pattern, make_plan
from lora_plugins.plugins import PLAIN, PlannedLayer, Registry, Slot
from lora_plugins.utils import in_float64, low_rank

Merge = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]
"""Computes one update `(out, in)` from updates `(n, out, in)`, weights `(n, 1, 1)`, a density and a generator."""


@dataclass(frozen=True)
class Combination:
    """The result of a combination, ready to be attached.

    Args:
        plan: What the new adapter adapts.
        content: Its factors by layer name and slot suffix.
        values: Its heads, biases and statistics by full name.
        relative_error: The largest relative error of a layer's update against the exact combination.
    """

    plan: Plan
    content: Mapping[tuple[str, str], SlotTensors]
    values: Mapping[str, Tensor]
    relative_error: float


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

_VARIANCE = "running_var"
"""What normalization layers of torch call their running variance."""

COMBINATIONS: Mapping[str, tuple[str, ...]] = {
    "cat": (),
    "linear": (),
    "svd": ("rank",),
    **dict.fromkeys(PRUNED, ("density", "rank")),
}
"""The ways to combine, with the options that each takes."""


def combine(
    model: nn.Module,
    state: ModelState,
    registry: Registry | None,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    options: Mapping[str, float],
) -> Combination:
    """Computes a new adapter from others; touches nothing. Arguments as in `LoraModel.add_weighted_adapter`."""
    _check(adapters, weights, combination_type, options)
    weights = [finite(f"The weight of {name!r}", weight) for name, weight in zip(adapters, weights, strict=True)]
    sources = [state.adapter(name).plan for name in adapters]
    for name, source in zip(adapters, sources, strict=True):
        _check_source(name, source)
        check_in_place(model, state, name)
    _check_alike(sources)
    terms = [_Terms.of(*each) for each in zip(adapters, weights, sources, strict=True)]
    layers: dict[str, PlannedLayer] = {}
    for layer in (layer for source in sources for layer in source.layers):
        layers.setdefault(layer.name, layer)
    results: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    error = 0.0
    for layer in layers.values():
        module = submodule(model, layer.name)
        for slot in layer.slots:
            found = [each.term(module, layer.name, slot) for each in terms if layer.name in each.scalings]
            A, B, relative = _combined(found, combination_type, options)
            largest = A.abs().amax() * B.abs().amax() * len(A)  # of B @ A, which is not formed here
            _check_range(layer.name, factor_dtype(detached_weight(module, slot.tensor)), A, B, largest)
            results[layer.name, slot.suffix] = (A, B)
            error = max(error, relative)
    plan = make_plan(model, _config(model, sources, layers, results), registry)
    return Combination(plan, _padded(results, plan), _values(model, state, adapters, weights), error)


def _check_source(name: str, plan: Plan) -> None:
    """Checks that the updates of an adapter can be added up."""
    if plan.init.changes_base:
        raise StateError(f"The adapter {name!r} has a base of its own ({plan.config.init}); it cannot be combined.")
    if plan.config.variant != PLAIN:
        raise StateError(
            f"The adapter {name!r} is of the variant {plan.config.variant!r}, whose updates do not add up; it cannot "
            "be combined."
        )


def _check_alike(sources: Sequence[Plan]) -> None:
    """Checks that adapters of one layer adapt the same of it, and of what shares its weight."""
    layers: dict[str, PlannedLayer] = {}
    trained = {name for source in sources for name in source.trained}
    for layer in (layer for source in sources for layer in source.layers):
        first = layers.setdefault(layer.name, layer)
        if first.slots != layer.slots:
            raise ConfigError(f"The adapters have different parts of {layer.name!r}; they cannot be combined.")
        if any(full_name(layer.name, slot.tensor) in trained for slot in layer.slots):
            raise ConfigError(
                f"One adapter adapts {layer.name!r}, and another one trains it in full; they cannot be combined. "
                "set_adapter([...]) lets both act."
            )
        if {tie.layer for tie in first.ties} != {tie.layer for tie in layer.ties}:
            others = listing(tie.layer for tie in (*first.ties, *layer.ties))
            raise ConfigError(
                f"Only one of the adapters adapts {others} with {layer.name!r}, whose weight they share; they "
                "cannot be combined."
            )
    tied = {tie.layer: layer.name for layer in layers.values() for tie in layer.ties}
    for name in tied.keys() & layers.keys():
        raise ConfigError(
            f"One adapter adapts {name!r} alone, and another one with {tied[name]!r}, whose weight it shares; they "
            "cannot be combined."
        )


@dataclass(frozen=True)
class _Term:
    """The update `weight * B @ A` of a slot, the scaling in `B`."""

    A: Tensor
    B: Tensor
    weight: float


@dataclass(frozen=True)
class _Terms:
    """What one adapter adds.

    Args:
        adapter: Its name.
        weight: Its weight.
        scalings: Its scaling in each layer that it adapts, by name.
    """

    adapter: str
    weight: float
    scalings: Mapping[str, float]

    @classmethod
    def of(cls, adapter: str, weight: float, plan: Plan) -> "_Terms":
        """Returns the terms of an adapter."""
        return cls(adapter, weight, {layer.name: layer.scaling for layer in plan.layers})

    def term(self, module: nn.Module, layer: str, slot: Slot) -> _Term:
        """Returns what it adds to a slot of a layer."""
        A, B = factors(module, self.adapter, slot)
        return _Term(in_float64(A.detach()), in_float64(B.detach()) * self.scalings[layer], self.weight)


def _check(
    adapters: Sequence[str], weights: Sequence[float], combination_type: str, options: Mapping[str, float]
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter.")
    if combination_type not in COMBINATIONS:
        raise ConfigError(f"There is no combination {combination_type!r}. {near(combination_type, COMBINATIONS)}")
    known = COMBINATIONS[combination_type]
    for key in options:
        if key not in known:
            raise ConfigError(f"{combination_type!r} has no option {key!r}. {near(key, known)}")
    numbers = {key: finite(key, value) for key, value in options.items()}
    if "density" in known and not 0 < numbers.get("density", -1) <= 1:
        raise ConfigError(
            f"{combination_type!r} needs a density: the share of elements to keep, above 0 and at most 1."
        )
    rank = numbers.get("rank", 1)
    if rank < 1 or rank != int(rank):
        raise ConfigError(f"rank is a whole number of at least 1, not {options['rank']!r}.")


def _check_range(name: str, dtype: torch.dtype, *tensors: Tensor) -> None:
    if not all(bool(tensor.to(dtype).isfinite().all()) for tensor in tensors):
        raise ConfigError(
            f"The combination of {name!r} has values that are not finite in {dtype}: a weight is too large, or an "
            "adapter has such values itself."
        )


def _combined(terms: list[_Term], kind: str, options: Mapping[str, float]) -> tuple[Tensor, Tensor, float]:
    """Returns A, B and the relative error of one slot's new update."""
    A, B = _cat(terms)
    full = min(A.shape[1], B.shape[0])
    if kind == "cat" or (kind == "linear" and A.shape[0] <= full):
        return A, B, 0.0
    exact = B @ A
    if not bool(exact.isfinite().all()):
        return A, torch.full_like(B, math.inf), 0.0  # which is refused by name
    if kind in PRUNED:
        updates = torch.stack([term.B @ term.A for term in terms])
        factor = torch.tensor([term.weight for term in terms], dtype=torch.float64, device="cpu").view(-1, 1, 1)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        exact = PRUNED[kind](updates.cpu(), factor, options["density"], generator)
    ranks = [term.A.shape[0] for term in terms]
    default = {"linear": full, "svd": max(ranks)}.get(kind, sum(ranks))
    rank = min(int(options.get("rank", default)), full)
    A, B = low_rank(exact, rank, 1.0)
    norm = torch.linalg.matrix_norm(exact)
    return A, B, float(torch.linalg.matrix_norm(B @ A - exact) / norm) if norm else 0.0


def _cat(terms: list[_Term]) -> tuple[Tensor, Tensor]:
    """Stacks the factors; terms with one A are added up instead, so that opposite ones cancel exactly."""
    merged: list[tuple[Tensor, Tensor]] = []
    for term in terms:
        B = term.B * term.weight
        same = next((at for at, (A, _) in enumerate(merged) if torch.equal(A, term.A)), None)
        if same is None:
            merged.append((term.A, B))
        else:
            merged[same] = (term.A, merged[same][1] + B)
    return torch.cat([A for A, _ in merged]), torch.cat([B for _, B in merged], dim=1)


def _config(
    model: nn.Module,
    sources: list[Plan],
    layers: Mapping[str, PlannedLayer],
    results: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
) -> LoraConfig:
    """A config that names every layer in full, with its rank, and gives a scaling of 1."""
    ranks: dict[str, int] = {}
    for (name, _), (A, _) in results.items():
        ranks[name] = max(ranks.get(name, 0), len(A))
    configs = [source.config for source in sources]
    biases = {config.bias for config in configs}
    targets = [*layers, *(tie.layer for layer in layers.values() for tie in layer.ties)]
    return LoraConfig(
        r=max(ranks.values()),
        alpha=float(max(ranks.values())),
        target_modules="|".join(sorted(exact_expression(name) for name in targets)),
        bias=next((bias for bias in ("all", "lora_only") if bias in biases), "none"),
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save}),
        rank_pattern={exact_pattern(name): rank for name, rank in ranks.items()},
        alpha_pattern={exact_pattern(name): float(rank) for name, rank in ranks.items()},
        fused_parts={
            exact_pattern(name): [slot.part for slot in layer.slots]
            for name, layer in layers.items()
            if layer.slots != tuple(layer.plugin.slots(submodule(model, name)))
        },
        norm="track" if any(config.norm == "track" for config in configs) else "freeze",
        allow_plugins=configs[0].allow_plugins,
        block_plugins=configs[0].block_plugins,
    )


def _padded(results: Mapping[tuple[str, str], tuple[Tensor, Tensor]], plan: Plan) -> dict[tuple[str, str], SlotTensors]:
    """Gives all slots of a layer one rank, by zeros."""
    content: dict[tuple[str, str], SlotTensors] = {}
    for layer, slot, _ in plan.slots():
        A, B = results[layer.name, slot.suffix]
        extra = layer.r - A.shape[0]
        A = torch.nn.functional.pad(A, (0, 0, 0, extra))
        B = torch.nn.functional.pad(B, (0, extra))
        content[layer.name, slot.suffix] = SlotTensors(A, B)
    return content


def _values(
    model: nn.Module, state: ModelState, adapters: Sequence[str], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Combines what the adapters trained in place, as differences from the base."""
    values: dict[str, Tensor] = {}
    for name in state.values.base:
        device = own_tensor(model, name).device  # values that are not in place may still be where the model was
        owned = [
            (state.values.value(model, adapter, name).to(device), weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in state.values.of(adapter)
        ]
        if not owned:
            continue
        base = state.values.base_value(model, name).to(device)
        if not base.dtype.is_floating_point:
            values[name] = owned[0][0].clone()
            continue
        # In float64, so that a single adapter of weight 1 gives its own value back.
        wide = total = in_float64(base)
        for value, weight in owned:
            total = total + weight * (in_float64(value) - wide)
        values[name] = total.to(owned[0][0])
        _check_range(name, values[name].dtype, values[name])
        if name.rpartition(".")[2] == _VARIANCE and bool((values[name] < 0).any()):
            raise ConfigError(
                f"The combination of {name!r} is less than 0 in places, and a variance is not: its norm would compute "
                "nan. Give weights from 0 on, of a sum of at most 1, or combine adapters with norm='freeze'."
            )
    return values
