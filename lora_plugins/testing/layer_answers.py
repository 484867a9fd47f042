"""Checks of what a plugin says of a layer: the vectors that its weight is multiplied by, and its biases."""

from collections.abc import Collection, Iterator, Sequence
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.inplace import detached_weight
from lora_plugins.plugins import LayerPlugin, Slot
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.layer_case import Holder, LayerCase, batched, call, is_values, mapped, runs
from lora_plugins.testing.required import real_tensors_of, refuse, require, require_close, uneven_sum

_OUTPUTS = 12
"""How many elements of the output are looked at."""


@as_check(
    "inputs",
    "inputs() gives all the vectors (n, in) that the weight's matrix is multiplied by, if the plugin has it",
    "the vectors have another order of dimensions than the columns of to_matrix(weight), are scaled, or "
    "leave out what the layer does to its input first.",
)
def _inputs(case: LayerCase) -> None:
    if type(case.plugin).inputs is LayerPlugin.inputs:
        return
    model = _model(case)
    arguments = case.arguments(model.layer)
    output = _flat(call(model, arguments))
    for slot in case.slots():
        try:
            vectors = _vectors_of(case, model, slot, arguments)
        except NotImplementedError:
            continue
        for each in (arguments, *_nearly_zero(arguments)):
            _span_the_gradient(case, model, slot, each)
        _of_each_row(case, model, slot, vectors)
        _size(case, model, slot, output, vectors)


def _nearly_zero(arguments: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yields inputs of which one has one value or two, so that the vectors are few, or have few: many span everything.

    Of two, the vectors tell apart what a curve makes of each.
    """
    for at, x in enumerate(arguments):
        for place, count in product({0, x.numel() // 2, x.numel() - 1}, (1, 2)) if is_values(x) and x.numel() else ():
            distance = torch.arange(x.numel(), device=x.device).view(x.shape) - place
            yield (*arguments[:at], x * ((distance >= 0) & (distance < count)), *arguments[at + 1 :])


def _span_the_gradient(case: LayerCase, model: Holder, slot: Slot, arguments: Sequence[Any]) -> None:
    """Requires that the gradient of the weight has rows that are combinations of the vectors, as in M @ x it has."""
    vectors = _vectors_of(case, model, slot, arguments)
    columns = case.plugin.to_matrix(detached_weight(model.layer, slot.tensor)).shape[1]
    require(
        vectors.dim() == 2 and vectors.shape[1] == columns,
        f"inputs() gave {tuple(vectors.shape)}, where the weight's matrix has {columns} columns",
    )
    output = _flat(call(model, arguments))
    rows = _gradient(case, model, slot, (output * torch.randn_like(output)).sum())
    if not (rows.isfinite().all() and vectors.isfinite().all()):
        return  # as of a layer that divides by the size of its input
    rest = rows - rows @ torch.linalg.pinv(vectors) @ vectors
    require(
        float(rest.abs().max()) <= 1e-8 * float(rows.abs().max()),
        "the weight's gradient is no combination of the vectors that inputs() gave",
    )


@as_check(
    "rows",
    "the rows of the weight's matrix are what the layer puts out, and its columns what they are computed from, or "
    "rows_are_outputs is False",
    "the weight has its inputs first: ColumnMajorPlugin is meant, in place of RowMajorPlugin.",
)
def _rows_are_outputs(case: LayerCase) -> None:
    """Requires that no weight is viewed the other way round, so that an output is a sum over rows of one column.

    Variants take rows for outputs, and inits draw A for as many inputs as there are columns. Tables are left out: where
    another weight follows, as in a factorized embedding, an output depends on all rows of a table.
    """
    if not case.plugin.rows_are_outputs or case.plugin.lookup:
        return
    model = _model(case)
    output = _flat(call(model, case.arguments(model.layer)))
    for slot in case.slots():
        used = [_gradient(case, model, slot, value) != 0 for value in _spread(output)]
        columns = {int(each.any(0).nonzero()) for each in used if int(each.any(0).sum()) == 1}
        by_one_column = all(int(each.any(0).sum()) <= 1 for each in used)
        by_several_rows = any(int(each.any(1).sum()) > 1 for each in used)
        require(
            not (by_one_column and by_several_rows and len(columns) > 1),
            f"each output depends on one column of the matrix of {slot.tensor!r}, and on several of its rows",
        )


def _vectors_of(case: LayerCase, model: Holder, slot: Slot, inputs: Sequence[Any]) -> Tensor:
    args, named = model.given(inputs)
    return case.plugin.inputs(model.layer, slot, *args, **named).detach()


def _model(case: LayerCase) -> Holder:
    """Builds the untouched layer in eval mode; in training mode if its output in eval mode depends on no weight.

    So it is where a layer keeps in eval mode what it has computed from its weight.
    """
    model = case.model().eval()
    output = _flat(call(model, case.arguments(model.layer)))
    weights = [model.layer.get_parameter(slot.tensor) for slot in case.slots()]
    depends = any(each is not None and bool(each.to_dense().any()) for each in _gradients(uneven_sum(output), weights))
    return case.model().train(not depends)


def _gradients(value: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Returns the gradients of a number; None for each tensor that it does not depend on."""
    if not value.requires_grad:
        return [None] * len(tensors)
    return torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)


def _flat(output: Any) -> Tensor:
    """Returns the numbers of an output that have a gradient."""
    found = [tensor.flatten() for tensor in real_tensors_of(output) if tensor.requires_grad]
    return torch.cat(found) if found else torch.empty(0, device="cpu")


def _gradient(case: LayerCase, model: Holder, slot: Slot, value: Tensor) -> Tensor:
    """Returns the gradient of a slot's rows of the weight's matrix."""
    weight = model.layer.get_parameter(slot.tensor)
    (gradient,) = _gradients(value, [weight])
    matrix = case.plugin.to_matrix(torch.zeros_like(weight) if gradient is None else gradient.to_dense())
    start, stop, _ = slot.rows or (0, len(matrix), len(matrix))
    return matrix[start:stop]


def _of_each_row(case: LayerCase, model: Holder, slot: Slot, vectors: Tensor) -> None:
    """Requires that the vectors of a batch are those of its rows together, in whatever order."""
    arguments = case.arguments(model.layer)
    rows = batched(arguments)
    count = len(arguments[0]) if any(rows) else 0
    single = [mapped(arguments, itemgetter(slice(at, at + 1)), rows) for at in range(count)]
    if not single or not all(runs(model, each) for each in single):
        return
    each = torch.cat([_vectors_of(case, model, slot, row) for row in single])
    require_close("the sum of the squares of the vectors that inputs() gave", vectors.T @ vectors, each.T @ each, 1e-8)


def _size(case: LayerCase, model: Holder, slot: Slot, output: Tensor, vectors: Tensor) -> None:
    """Requires that the vectors have the right size, which the bias tells: it is multiplied by 1 where W is by x.

    That holds where the output is a sum of products with W. Where it is not, or there is no bias to compare with, or
    the weight meets a sum of several vectors or another parameter, nothing is required.
    """
    biases = {name: model.layer._parameters.get(name) for name in case.plugin.biases(model.layer)}
    given = [bias for name, bias in biases.items() if bias is not None and _is_added(case, name, {slot.tensor})]
    if not given or not _is_linear_in(case, slot) or _meets_others(case, slot, biases):
        return
    lengths = vectors.square().sum(1)
    for value in _spread(output):
        one = sum(float(each.sum()) for each in _gradients(value, given) if each is not None)
        for row in _gradient(case, model, slot, value):
            products = vectors @ row
            along = products.square() >= (1 - 1e-9) * lengths * row.square().sum()
            factors = products[along & (lengths > 0)] / lengths[along & (lengths > 0)]
            if one and bool(row.any()) and len(factors):
                factor = float(factors[(factors - one).abs().argmin()])
                is_gradient = bool(((factors - 1).abs() <= 1e-6).any())  # right, as a layer may scale its bias apart
                require(
                    is_gradient or abs(factor - one) <= 1e-6 * abs(one),
                    f"an output has {factor:.4g} times a vector of inputs() as the gradient of the weight, and "
                    f"{one:.4g} as that of the bias",
                )


def _spread(output: Tensor) -> Iterator[Tensor]:
    steps = torch.linspace(0, len(output) - 1, min(_OUTPUTS, len(output)), device=output.device)
    yield from output[steps.long()]


def _is_linear_in(case: LayerCase, slot: Slot) -> bool:
    """Whether the output is a sum of something and something times the weight."""
    outputs = [
        _flat(call(_scaled(case, [slot.tensor], factor), case.arguments(case.model().layer))) for factor in (0, 1, 2)
    ]
    return torch.allclose(outputs[2] - outputs[1], outputs[1] - outputs[0])


def _meets_others(case: LayerCase, slot: Slot, biases: Collection[str]) -> bool:
    """Whether the gradient of the weight depends on other parameters of the layer, as where two weights are a chain."""
    parameters = case.model().layer._parameters.items()
    floating = {name for name, each in parameters if each is not None and each.is_floating_point()}
    return _depends_on(case, slot.tensor, floating - {slot.tensor, *biases})


def _depends_on(case: LayerCase, name: str, others: Collection[str]) -> bool:
    """Whether the gradient of a parameter is another one where other parameters are twice as large."""
    first, second = (_gradient_of(case, name, 0, factor, others) for factor in (1, 2))
    return first is not None and second is not None and not torch.allclose(first.to_dense(), second.to_dense())


def _scaled(case: LayerCase, weights: Collection[str], factor: float) -> Holder:
    model = _model(case)
    with torch.no_grad():
        for weight in weights:
            model.layer.get_parameter(weight).mul_(factor)
    return model


@as_check(
    "biases",
    "biases() names the parameters of the layer that are added to its output, and no others",
    "the layer calls its bias otherwise than 'bias', or biases() names something else.",
)
def _biases(case: LayerCase) -> None:
    layer = case.model().layer
    names = list(case.plugin.biases(layer))
    weights = {slot.tensor for slot in (*case.slots(), *case.plugin.parts(layer).values())}
    for name in names:
        require(name not in weights, f"biases() names {name!r}, which is the weight of a slot")
    # The default names a bias that a layer without any need not have.
    if type(case.plugin).biases is not LayerPlugin.biases:
        missing = [name for name in names if not _has(layer, name)]
        require(not missing, f"biases() names {missing}, and the layer has the parameters {list(layer._parameters)}")
    added = [name for name in _vectors(layer) if name not in weights and _is_added(case, name, weights)]
    left_out = [name for name in added if name not in names]
    require(not left_out, f"{left_out} is added to the output whatever the input is, and biases() names {names}")
    # Where the output is linear in the weights, a parameter whose gradient depends on them is a factor.
    factors = [name for name in names if name in _vectors(layer) and _depends_on(case, name, weights)]
    if factors and all(_is_linear_in(case, slot) for slot in case.slots()):
        refuse(f"biases() names {factors}, by which the output is multiplied")


def _has(layer: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    owner = layer.get_submodule(path)
    return key in owner._parameters or getattr(owner, key, owner) is None  # as layers without a bias often say


def _vectors(layer: nn.Module) -> list[str]:
    """Returns the names of a layer's own parameters that are vectors."""
    parameters = layer._parameters.items()
    return [name for name, p in parameters if p is not None and p.dim() == 1 and p.is_floating_point()]


def _is_added(case: LayerCase, name: str, weights: set[str]) -> bool:
    """Whether a parameter is added to the output: its gradient knows neither the inputs nor the weights."""
    first = _gradient_of(case, name, seed=0, factor=1)
    others = [_gradient_of(case, name, seed, factor, weights) for seed, factor in ((0, 2), (1, 1))]
    return (
        first is not None
        and bool(first.any())
        and all(other is not None and torch.allclose(other, first) for other in others)
    )


def _gradient_of(case: LayerCase, name: str, seed: int, factor: float, weights: Collection[str] = ()) -> Tensor | None:
    model = _scaled(case, weights, factor)
    output = _flat(call(model, case.arguments(model.layer, seed)))
    (found,) = _gradients(uneven_sum(output), [model.layer.get_parameter(name)])
    return found


ANSWER_CHECKS: tuple[Check[LayerCase], ...] = (_rows_are_outputs, _inputs, _biases)
