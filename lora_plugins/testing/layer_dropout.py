"""Checks of dropout and of variants: what a branch is there for besides speed."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_plugins.errors import TargetError
from lora_plugins.inplace import factors, layer_state, own_tensors_of
from lora_plugins.plugins import PLAIN, Slot
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.layer_case import (
    VARIANT,
    Holder,
    LayerCase,
    adapter_leaves,
    add_second,
    call,
    copies,
    is_values,
    lawful,
    mapped,
    moved,
    named_leaves,
    require_lawful,
    require_sum,
)
from lora_plugins.testing.layer_law import compare_gradients
from lora_plugins.testing.required import (
    TIGHT,
    random_states,
    real_tensors_of,
    refuse,
    require,
    require_all_close,
    require_close,
    require_unmoved,
    uneven_sum,
)
from lora_plugins.utils import own_randomness

_BARELY = 1e-9
"""A dropout with which a branch does all that it does for dropout, and drops nothing."""

_SMALL, _ALIKE = 1e-5, 1e-3
"""The size of an update to whose effect its square adds nothing, and how much effects may differ then."""

_Mask = Callable[[Tensor], Tensor]
"""Returns what is kept of an input: a tensor of zeros and ones."""

_DRAWS, _AT_ONCE, _OFF = 300, 50, 0.25
"""Of dropout: draws at most, how many before their mean is looked at, and by what share of a branch it may be off."""


class _Pair(NamedTuple):
    """Two elements of one floating input of a layer, at positions that differ in the dimension `axis` alone."""

    input: int
    axis: int
    positions: tuple[tuple[int, ...], tuple[int, ...]]


@as_check(
    "dropout",
    "in training mode dropout drops single elements of the branch's input and nothing else, by a mask from torch's "
    "generator; in eval mode nothing; a layer without a branch for its class refuses it",
    "branch does not call term.drop(x) for each term, drops the input of the base as well, or drops something "
    "other than x, such as A(x) or the update; or its mask comes from NumPy, Python or a generator of its own.",
)
def _dropout(case: LayerCase) -> None:
    if not case.has_branch or case.plugin.lookup:
        _is_refused(case)
        return
    if _draws_itself(case):
        _drops_beside_its_own(case)
        return
    idle = case.adapted(dropout=0.5).train()
    with torch.no_grad():
        for parameter in adapter_leaves(idle.layer):
            parameter.zero_()
    inputs = case.arguments(idle.layer)
    untouched = _values(call(lawful(case, idle, {}), inputs))
    require_close("the output with dropout=0.5 and an update of zero", _values(call(idle, inputs)), untouched)
    for first, second in ((0.5, 0.0), (0.0, 0.5)):
        _drops_of_its_own(case, first, second)
    _drops_the_input(case)


def _draws_itself(case: LayerCase) -> bool:
    """Whether the untouched layer draws random numbers in training, among which a branch's own cannot be told."""
    model = case.model().train()
    inputs = case.arguments(model.layer)
    first, second = (_values(call(model, inputs, seed)) for seed in (1, 2))
    return not torch.equal(first, second)


def _drops_beside_its_own(case: LayerCase) -> None:
    """Requires of a layer that draws random numbers itself that dropout does something in training, and not in eval."""
    model = moved(case.adapted(dropout=0.5))
    inputs, reference = case.arguments(model.layer), lawful(case, model.train())
    outputs = ((call(each, inputs, seed) for each in (model, reference)) for seed in range(_AT_ONCE))
    drops = any(not torch.allclose(_values(got), _values(without), rtol=0, atol=TIGHT) for got, without in outputs)
    require(drops, "with dropout=0.5 every output is that without dropout")
    require_lawful("the output in eval mode", case, model.eval(), inputs)


def _values(output: Any) -> Tensor:
    """Returns the floating numbers of all tensors of an output, one after another."""
    return torch.cat([tensor.flatten() for tensor in real_tensors_of(output) if tensor.is_floating_point()])


def _drops_of_its_own(case: LayerCase, first: float, second: float) -> None:
    """Requires that one adapter, whose update is zero, drops nothing of the input of another one without dropout."""
    model = case.model().train()
    lora = case.adapt(model, dropout=first)
    add_second(lora, dropout=second)
    drops, other = ("default", "second") if first else ("second", "default")
    with torch.no_grad():
        for name, parameter in named_leaves(model.layer).items():
            if name.endswith(f".{drops}"):
                parameter.zero_()
    what = "the output without dropout, beside an update of zero with dropout=0.5"
    require_lawful(what, case, model, case.arguments(model.layer), weights={other: 1.0})


def _is_refused(case: LayerCase, **fields: Any) -> None:
    model = case.model()
    try:
        case.adapt(model, dropout=0.5, **fields)
    except TargetError:
        require(type(model.layer) is type(case.model().layer), "the refusal changed the layer")
        return
    refuse("a layer without a branch accepted dropout=0.5")


def _drops_the_input(case: LayerCase, **fields: Any) -> None:
    """Requires that dropout drops single elements of each branch's input in training, and nothing in eval mode."""
    for at in range(len(case.slots())):
        _drops_for(case, at, **fields)
    model = moved(case.adapted(dropout=_BARELY, **fields)).train()
    compare_gradients(case, model, lawful(case, model), _ALIKE)
    model = moved(case.adapted(dropout=0.5, **fields)).eval()
    inputs = case.arguments(model.layer)
    require_lawful("the output in eval mode", case, model, inputs)


def _drops_for(case: LayerCase, at: int, **fields: Any) -> None:
    """Requires that of one slot in training, with an update so small that the output of any layer is linear in it."""
    model = case.adapted(dropout=0.5, init="kaiming", **fields).train()
    slot = layer_state(model.layer).adapters["default"].slots[at]
    with own_randomness(2), torch.no_grad():
        _, B = factors(model.layer, "default", slot)
        B.copy_(torch.randn(B.shape) * _SMALL)
        for own in own_tensors_of(model.layer, "default", slot).values():
            own.mul_(1 + _SMALL)
    inputs = case.arguments(model.layer)
    _draws_from_torch(model, inputs)
    _is_the_branch_on_average(case, model, inputs)
    _drops_single_elements(case, model, slot, inputs)


def _is_the_branch_on_average(case: LayerCase, model: Holder, inputs: Sequence[Any]) -> None:
    """Requires that draws differ, and that their mean is the branch, in whose input dropping is linear.

    Four deviations of the mean of all draws are below the share that it may be off. The mean of fewer is looked at as
    well: what their scatter adds makes a right one seem wrong, and never a wrong one right.
    """
    untouched = _values(call(lawful(case, model, {}), inputs)).detach()
    branch = _update(case, model, inputs)
    size = float(branch.abs().mean())
    outputs: list[Tensor] = []
    while len(outputs) < _DRAWS:
        seeds = range(len(outputs), len(outputs) + _AT_ONCE)
        outputs += [_values(call(model, inputs, seed)).detach() for seed in seeds]
        require(any(not torch.equal(outputs[0], one) for one in outputs), "with dropout=0.5 every output is the same")
        error = float((torch.stack(outputs).mean(0) - untouched - branch).abs().mean())
        if error < _OFF * size:
            return
    refuse(f"the mean over {_DRAWS} draws is off by {error / size:.0%} of the branch")


def _draws_from_torch(model: Holder, inputs: Sequence[Any]) -> None:
    """Requires that masks come from torch's generator, whose state gradient checkpointing and resuming restore."""
    with own_randomness(1, model):
        others = {whose: state for whose, state in random_states().items() if whose != "the process"}
        first = model(*inputs)
        require_unmoved(others)
    require_all_close("the output with dropout=0.5 and the same seed of torch", call(model, inputs, 1), first)


def _update(case: LayerCase, model: Holder, inputs: Sequence[Any]) -> Tensor:
    """Returns what the update adds to the output if nothing is dropped."""
    untouched = _values(call(lawful(case, model, {}), inputs))
    return (_values(call(lawful(case, model), inputs)) - untouched).detach()


def _drops_single_elements(case: LayerCase, model: Holder, slot: Slot, inputs: Sequence[Any]) -> None:
    """Requires that two elements of an input, all others zero, are dropped each by itself, and scaled if kept.

    Of a layer that multiplies its inputs, as a bilinear one, nothing is left then. One column of the other inputs is
    kept there, and the two elements are in different rows, so that whichever input is dropped, each is by itself.
    """
    if not _drops_each(case, model, slot, inputs, torch.zeros_like, axes=None):
        _drops_each(case, model, slot, inputs, _first_column, axes=(0,))


def _drops_each(
    case: LayerCase, model: Holder, slot: Slot, inputs: Sequence[Any], rest: _Mask, axes: Collection[int] | None
) -> bool:
    """Requires that the elements of each pair that can be judged are dropped each by itself; returns if there was one.

    The elements of a pair may differ in the dimensions `axes`, or in all, and `rest` says what is kept of other inputs.
    """
    judged_one = False
    pairs = [*_pairs(inputs)]
    feeding_inputs = {
        pair.input
        for pair in pairs
        if _reach_others(case, model, slot, [_only(inputs, pair.input, [each], rest) for each in pair.positions])
    }
    for pair in pairs:
        if pair.input not in feeding_inputs or (axes is not None and pair.axis not in axes):
            continue  # the branch's input is computed from this one, as between the two layers of a perceptron
        both = _only(inputs, pair.input, pair.positions, rest)
        one, other = (_update(case, model, _only(inputs, pair.input, [each], rest)) for each in pair.positions)
        if _add_up(_update(case, model, both), one, other):  # else the update is no sum over these two
            _drops_apart(case, model, both, one, other)
            judged_one = True
    return judged_one


def _drops_apart(case: LayerCase, model: Holder, both: Sequence[Any], one: Tensor, other: Tensor) -> None:
    """Requires that draws for inputs of two elements give the update of either, of both, and of none, and no other."""
    untouched = _values(call(lawful(case, model, {}), both)).detach()
    outcomes = {kept: 2 * (kept[0] * one + kept[1] * other) for kept in product((0, 1), repeat=2)}
    size = max(float(outcome.abs().max()) for outcome in outcomes.values())
    seen: set[tuple[int, ...]] = set()
    for seed in range(64):  # all four outcomes are missing one with a probability of 4e-8
        got = _values(call(model, both, seed)).detach() - untouched
        fits = [kept for kept, outcome in outcomes.items() if float((got - outcome).abs().max()) <= _ALIKE * size]
        require(
            bool(fits),
            "of an input of two elements, a draw gives an update that is neither of one nor of the other, of both, or "
            "of none",
        )
        seen |= {*fits}
        if len(seen) == len(outcomes):
            return
    refuse("two elements of the input are always dropped together, or never")


def _reach_others(case: LayerCase, model: Holder, slot: Slot, each: Sequence[Sequence[Any]]) -> bool:
    """Whether one call uses other entries of a slot's matrix than another one, by the gradient of its weight."""
    reached = []
    for inputs in each:
        reference = lawful(case, model, {})
        total = uneven_sum(_values(call(reference, inputs)))
        (gradient,) = torch.autograd.grad(total, getattr(reference.layer, slot.tensor))
        reached.append(slot.cut(case.plugin.to_matrix(gradient.to_dense())) != 0)
    return all(entries.any() for entries in reached) and not (reached[0] & reached[1]).any()


def _pairs(inputs: Sequence[Any]) -> Iterator[_Pair]:
    """Yields a pair for each dimension of each floating input: the first element, and the last one of its line."""
    for at, x in enumerate(inputs):
        shape = x.shape if is_values(x) else ()
        for axis, size in enumerate(shape):
            if size > 1:
                last = tuple(size - 1 if each == axis else 0 for each in range(len(shape)))
                yield _Pair(at, axis, ((0,) * len(shape), last))


def _only(inputs: Sequence[Any], at: int, positions: Sequence[tuple[int, ...]], rest: _Mask) -> tuple[Any, ...]:
    """Returns the inputs with zeros everywhere but at some positions of one, and what is to be kept of the others."""

    def masked(x: Tensor) -> Tensor:
        chosen = x is inputs[at]
        mask = torch.zeros_like(x) if chosen else rest(x)
        for position in positions if chosen else ():
            mask[position] = 1
        return x * mask

    return mapped(inputs, masked, [is_values(x) for x in inputs])


def _first_column(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    (mask[..., :1] if x.dim() else mask).fill_(1)
    return mask


def _add_up(both: Tensor, one: Tensor, other: Tensor) -> bool:
    size = float(both.abs().max())
    alike = float((one - other).abs().max()) <= 10 * _ALIKE * size
    distinct = bool(one.any()) and bool(other.any()) and not alike
    return distinct and float((both - one - other).abs().max()) <= _ALIKE * size


@as_check(
    "variant",
    "with a variant, whose update is any matrix, the layer computes W + that matrix, with dropout too if the "
    "plugin says branch_takes_delta=True",
    "branch does not add term.delta where a term has one and only there, detaches it, or drops nothing of its "
    "input then.",
)
def _variant(case: LayerCase) -> None:
    if not case.plugin.rows_are_outputs:
        return  # refused by name when it is planned
    for parts in case.selections():
        model = moved(case.adapted(variant=VARIANT, fused_parts=parts))
        inputs = case.arguments(model.layer)
        for training in (False, True):
            model.train(training)
            require_lawful(f"the output with {VARIANT}", case, model, inputs)
        compare_gradients(case, model, lawful(case, model))
    if not case.has_branch or not case.plugin.branch_takes_delta or case.plugin.lookup:
        _is_refused(case, variant=VARIANT)
    elif not _draws_itself(case):
        _drops_the_input(case, variant=VARIANT)
    for first, second in ((VARIANT, PLAIN), (PLAIN, VARIANT)):
        require_sum(case, {"variant": first}, {"variant": second})


@as_check(
    "function",
    "called with the weight of the adapted layer and any bias, the plugin's function computes what the layer with "
    "that bias does, dropout included",
    "the layer's forward does more than the function, or branch reads other attributes of the layer than its bias.",
)
def _function(case: LayerCase) -> None:
    """Requires that a function of torch, called with the weight of a layer and a bias, is the layer with that bias."""
    function = type(case.plugin).function
    if function is None or not case.has_branch:
        return
    untouched = case.model().eval()
    inputs = case.arguments(untouched.layer)
    with own_randomness(1, untouched):
        got = function(*copies(inputs), untouched.layer.weight, untouched.layer.bias)
    require_all_close(f"the output of {function.__name__} for an untouched layer", got, call(untouched, inputs))
    model = case.adapted(dropout=0.5).train()
    other = copy.deepcopy(model)
    if isinstance(bias := other.layer.bias, Tensor):
        bias.data.mul_(2)
    with own_randomness(1, model):
        got = function(*copies(inputs), model.layer.weight, bias)
    require_all_close(f"the output of {function.__name__}, called with the weight,", got, call(other, inputs))


DROPOUT_CHECKS: tuple[Check[LayerCase], ...] = (_dropout, _function, _variant)
