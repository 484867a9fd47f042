"""What the kit for inits checks of a start: the values of A and B, and what the adapted model computes."""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lora_plugins.errors import LoraError, TargetError
from lora_plugins.inplace import detached_weight
from lora_plugins.model import LoraModel
from lora_plugins.plugins import InitContext, SlotCalibration
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.init_case import InitCase, Small, layer_weights, run
from lora_plugins.testing.required import (
    TIGHT,
    double_by_default,
    random_states,
    refuse,
    require,
    require_close,
    require_same_state,
    require_unmoved,
)

_LIKE = 10
"""How many times farther off than the best of their rank factors may be: those that leave rounding alone, twice."""

_DEPENDENT = 1e-5
"""What rows that depend on each other are off by, at most, as factors in float32 are rounded."""


@as_check(
    "registration",
    "the registrar takes the plugin, and check_options takes its options",
    "an attribute such as name is missing, or an option has no default.",
)
def _registration(case: InitCase) -> None:
    case.registry()
    merged = {**case.init.options, **case.options}
    require(merged.keys() == set(case.init.options), f"the options are {list(merged)}")
    case.init.check_options(merged)


@as_check(
    "filled",
    "fill gives every value of A and B, in place, also for weights with rows and columns of zeros, as pruning "
    "leaves them, and for inputs that are always zero; or it refuses these by a TargetError",
    "a new tensor is made instead of context.A.copy_(...), ranks beyond those of the weight are left out, or "
    "something is divided by a norm or a variance that may be zero.",
)
def _filled(case: InitCase) -> None:
    for context in _started(case):
        _require_finite(context)
    for context in case.contexts(case.model()):
        pruned = _pruned(context)
        try:
            with torch.no_grad():
                case.init.fill(pruned)
        except TargetError:
            continue
        _require_finite(pruned, ", where an input and an output of the layer are always zero")


def _require_finite(context: InitContext, where: str = "") -> None:
    for name, factor in (("A", context.A), ("B", context.B)):
        bad = int((~factor.isfinite()).sum())
        said = f"{bad} of {factor.numel()} values of {name} of {context.layer!r} are not finite, or unset{where}"
        require(not bad, said)


def _pruned(context: InitContext) -> InitContext:
    """Returns a context in which the first input and the first output are zero, in the weight and in the data."""
    inputs, gradient = context.calibration.inputs, context.calibration.gradient
    calibration = replace(
        context.calibration,
        inputs=inputs and replace(inputs, total=_zeroed(inputs.total), gram=_zeroed(inputs.gram)),
        gradient=None if gradient is None else _zeroed(gradient),
    )
    return replace(context, weight=_zeroed(context.weight), calibration=calibration)


def _zeroed(tensor: Tensor) -> Tensor:
    """Returns a copy whose values are zero at the first place of each dimension."""
    zeroed = tensor.clone()
    for axis in range(tensor.dim()):
        zeroed.select(axis, 0).zero_()
    return zeroed


@as_check(
    "device",
    "what fill makes is where A and B are, whatever torch's default device is",
    "torch.randn(shape) where torch.randn(shape, device=context.A.device) is meant.",
)
def _device(case: InitCase) -> None:
    there, elsewhere = _started(case), case.contexts(case.model())
    # A tensor that is made without saying where lands on the default device, which is none here.
    with torch.no_grad(), torch.device("meta"):
        for context in elsewhere:
            case.init.fill(context)
    _require_same_factors(elsewhere, there, " with another default device")


def _require_same_factors(got: Sequence[InitContext], expected: Sequence[InitContext], how: str) -> None:
    for own, wanted in zip(got, expected, strict=True):
        require_close(f"A of {own.layer!r}{how}", own.A, wanted.A, 0)
        require_close(f"B of {own.layer!r}{how}", own.B, wanted.B, 0)


@as_check(
    "trainable",
    "of each rank, the row of A or the column of B is not zero, nor are both the same combination of others: else "
    "it never gets a gradient, or none of its own",
    "both factors start at zero, or the ranks that a decomposition does not have do; or one row is drawn for all.",
)
def _trainable(case: InitCase) -> None:
    for context in _started(case):
        possible = min(len(context.A), *context.weight.shape)
        dead = ~(context.A.bool().any(1) | context.B.bool().any(0))
        require(
            len(dead) - int(dead.sum()) >= possible,
            f"{int(dead.sum())} of {len(dead)} ranks of {context.layer!r} are zero in both A and B",
        )
        found = _independent_ranks(context)
        require(
            found >= possible,
            f"the {len(dead)} ranks of {context.layer!r} are combinations of {found} in both A and B, and so is what "
            f"training makes of them, where {possible} are possible",
        )


def _independent_ranks(context: InitContext) -> int:
    """Returns how many ranks an update can ever have: the rank of the rows of A and the columns of B side by side.

    Of a combination of ranks that is zero in both factors the gradients are zero too, before each step and after it.
    """
    # What rows depend on is neither the size of a factor nor that of a row.
    both = [normalize(each.double().flatten(), dim=0).view(each.shape) for each in (context.A, context.B.T)]
    return int(torch.linalg.matrix_rank(normalize(torch.cat(both, 1)), rtol=_DEPENDENT))


@as_check(
    "identity",
    "the adapted model starts as the untouched one, or, where the base changes, as near to it as its ranks allow; "
    "with identity=False it does not",
    "no factor is zero and nothing makes up for it, changed_base takes out another product than that of A and B or "
    "puts another weight in the place of the model's, or identity is declared wrongly.",
)
def _identity(case: InitCase) -> None:
    _require_start(case)


def _require_start(case: InitCase, **fields: Any) -> None:
    """Requires the start that the init declares, with further fields of the config."""
    model = case.model(torch.float64)
    before, weights = run(model), layer_weights(model, case.layers)
    lora = case.adapt(model, **fields)
    after = run(model)
    if not case.init.identity:
        require(not torch.allclose(after, before), "identity=False, and the output is that of the untouched model")
    elif not case.init.changes_base:
        require_close("the output", after, before)
    else:
        require_near_start(lora, weights)
        _makes_up(lora, weights)


def require_near_start(lora: LoraModel, untouched: Mapping[str, Tensor], slack: float = 0.0) -> None:
    """Requires that W + ΔW is no farther off than the changed base alone, nor than zeros would be.

    Args:
        lora: The started model.
        untouched: The weights before, by name.
        slack: What may come on top, as a share of what the changed base is off by.
    """
    for name, weight in untouched.items():
        lost, left = (float(each.norm()) for each in _off(lora, name, weight))
        require(
            left <= lost * (1 + slack) + TIGHT,
            f"W + ΔW of {name!r} is off by {left:.3g}, and the changed base alone by {lost:.3g}",
        )
        zeros = float(weight.norm())
        require(left <= zeros + TIGHT, f"W + ΔW of {name!r} is off by {left:.3g}, and zeros would be by {zeros:.3g}")


def _makes_up(lora: LoraModel, untouched: Mapping[str, Tensor]) -> None:
    """Requires that the factors make up for what the base has lost about as well as any factors of their rank can.

    Of a product that was taken out, that is all; of what was rounded off, what few ranks have.
    """
    for layer in lora.plans["default"].layers:
        lost, left = _off(lora, layer.name, untouched[layer.name])
        least = float(torch.linalg.svdvals(lost.flatten(1))[layer.r :].norm())
        many = 2 * layer.r > min(lost.flatten(1).shape)  # which could make up for most rounding, and need not
        require(
            many or float(left.norm()) <= _LIKE * least + TIGHT * max(1.0, float(lost.norm())),
            f"W + ΔW of {layer.name!r} is off by {float(left.norm()):.3g}, and could be by {least:.3g} with this rank",
        )


def _off(lora: LoraModel, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns by what the changed base of a layer is off, and by what its weight with the update."""
    base = detached_weight(lora.model.get_submodule(name), "weight")
    return weight - base, weight - layer_weights(lora.model, [name])[name]


@as_check(
    "scaling",
    "the start does not depend on alpha and use_rslora",
    "the update is scaling * B @ A, and fill or changed_base leaves context.scaling out.",
)
def _scaling(case: InitCase) -> None:
    if case.init.identity:
        for fields in ({"alpha": 0.25}, {"alpha": 64.0}, {"alpha": 3.0, "use_rslora": True}):
            _require_start(case, **fields)


@as_check(
    "reproducible",
    "the same model starts with the same bits whatever was drawn before, in whatever order its layers are started "
    "and whatever torch's default type is, and the random numbers of the process, Python's and NumPy's stay",
    "a function is called without generator=context.generator, or makes a tensor without dtype=context.A.dtype; or "
    "the plugin keeps something between calls.",
)
def _reproducible(case: InitCase) -> None:
    first, second, third = case.model(), case.model(), case.model()
    case.adapt(first)
    torch.rand(7)
    random.random()
    before = random_states()
    case.adapt(second)
    require_unmoved(before)
    require_same_state("the same model, started again,", second.state_dict(), first.state_dict())
    with double_by_default():
        case.adapt(third)
    require_same_state("the same model, started where float64 is the default,", third.state_dict(), first.state_dict())
    _require_same_factors(_started(case, backwards=True), _started(case), ", started after other layers,")


@as_check(
    "seed",
    "another seed (which comes from the run's seed and the layer's name) and another weight give another start",
    "fill makes a generator of its own with a fixed seed, so that all layers start the same. For an init that is "
    "meant to start all layers the same, such as one of a fixed basis, skip it: skip=['seed'].",
)
def _seed(case: InitCase) -> None:
    one, two = (_started(case, seed) for seed in (0, 1))
    for first, second in zip(one, two, strict=True):
        same = torch.equal(first.A, second.A) and torch.equal(first.B, second.B)
        require(not same, f"{first.layer!r} starts the same with another seed and another weight")


def _started(case: InitCase, seed: int = 0, *, backwards: bool = False) -> Sequence[InitContext]:
    """Returns what an init has filled for each layer of the model of a seed."""
    contexts = case.contexts(case.model(seed=seed), seed)
    with torch.no_grad():
        for context in reversed(contexts) if backwards else contexts:
            case.init.fill(context)
    return contexts


@as_check(
    "pure",
    "fill leaves the weight, the options and the calibration as they are",
    "an operation in place on context.weight or context.calibration: work on a copy.",
)
def _pure(case: InitCase) -> None:
    for context in case.contexts(case.model()):
        before = copy.deepcopy((dict(context.options), context.calibration))
        weight = context.weight.clone()
        with torch.no_grad():
            case.init.fill(context)
        require_close(f"the weight of {context.layer!r} after fill", context.weight, weight, 0)
        require(dict(context.options) == before[0], f"the options were {before[0]} and are {dict(context.options)}")
        for got, expected in zip(_tensors(context.calibration), _tensors(before[1]), strict=True):
            require_close(f"the calibration of {context.layer!r} after fill", got, expected, 0)


def _tensors(calibration: SlotCalibration) -> list[Tensor]:
    moments = [calibration.inputs.total, calibration.inputs.gram] if calibration.inputs else []
    return moments if calibration.gradient is None else [*moments, calibration.gradient]


@as_check(
    "ranks",
    "r=1, and an r larger than the weight has, start with finite values, as near to the untouched model as other "
    "ranks do, and with ranks that learn, or are refused by a TargetError",
    "the decomposition of an (out, in) matrix has min(out, in) ranks at most; the others need a start too.",
)
def _ranks(case: InitCase) -> None:
    for r in (1, 2, 40):
        model: Small = case.model()
        before = copy.deepcopy(model.state_dict())
        try:
            case.adapt(model, r=r, alpha=float(r))
        except LoraError:
            require_same_state(f"the model after r={r} was refused", model.state_dict(), before)
            continue
        except Exception as error:  # whatever a library raises that cannot do it
            refuse(f"r={r} ended in {type(error).__name__}: {error}")
        for name, tensor in model.state_dict().items():
            require(bool(tensor.isfinite().all()), f"{name!r} has values that are not finite, at r={r}")
        _trainable.run(replace(case, r=r))
        _require_start(replace(case, r=r))


START_CHECKS: tuple[Check[InitCase], ...] = (
    _registration,
    _filled,
    _trainable,
    _identity,
    _scaling,
    _reproducible,
    _pure,
    _seed,
    _device,
    _ranks,
)
"""Checks of the values that an init gives."""
