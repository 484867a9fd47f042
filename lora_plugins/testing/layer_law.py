"""Checks of the law: what an adapted layer computes, and its gradients."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.config import LoraConfig
from lora_plugins.errors import near
from lora_plugins.inplace import detached_weight, layer_state
from lora_plugins.model import LoraModel
from lora_plugins.plugins import Slot, class_path
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.layer_case import (
    Holder,
    LayerCase,
    call,
    config_like,
    is_values,
    lawful,
    named_leaves,
    require_lawful,
    require_sum,
    updated,
)
from lora_plugins.testing.required import (
    MODES,
    TIGHT,
    EvidentError,
    MismatchError,
    real_tensors_of,
    require,
    require_all_close,
    require_close,
    require_same_form,
    tensors_of,
    uneven_sum,
)

_SETTINGS: tuple[dict[str, Any], ...] = ({}, {"use_rslora": True}, {"memory": "low"})
"""Fields of a config that change the settings of a term."""


@as_check(
    "registration",
    "the registrar takes the plugin, and the layer that was built is of its module_type and has the weights that "
    "slots() and parts() name",
    "an attribute such as name or module_type is missing or misspelt, or a weight in slots() or parts() is; or "
    "build() makes another class.",
)
def _registration(case: LayerCase) -> None:
    layer = case.model().layer
    found = case.registry().layer_for(type(layer))
    require(
        found is case.plugin, f"a {class_path(type(layer))} was built, and module_type is {case.plugin.module_type!r}"
    )
    LoraModel.plan(case.model(), LoraConfig(target_modules="layer"), registry=case.registry())
    for _ in _named_weights(case, layer):
        pass
    output = _untouched_output(case)
    require(
        bool(tensors_of(output)),
        f"the layer gives a {type(output).__name__}, and the kit looks for tensors in tuples, lists, mappings and "
        "dataclasses",
    )
    finite = any(bool(tensor.isfinite().any()) for tensor in tensors_of(output))
    require(finite, "the untouched layer gives no finite number")


def _untouched_output(case: LayerCase) -> Any:
    """Returns what the untouched layer gives in training mode.

    Raises:
        EvidentError: If its forward or its backward fails.
    """
    model, step = case.model().train(), "forward"
    try:
        output = call(model, case.arguments(model.layer))
        step = "backward"
        torch.autograd.backward([uneven_sum(each) for each in real_tensors_of(output) if each.requires_grad])
    except Exception as error:  # whatever the layer raises
        raise EvidentError(
            f"the {step} of the untouched layer fails with what inputs() makes: {type(error).__name__}: {error}"
        ) from error
    return output


def _named_weights(case: LayerCase, layer: nn.Module) -> Iterator[tuple[Slot, Tensor]]:
    """Yields the slots of a layer and of its parts, each with its weight."""
    named = {"slots": case.plugin.slots(layer), "parts": case.plugin.parts(layer).values()}
    biases = case.plugin.biases(layer)
    weights = [name for name, weight in layer._parameters.items() if weight is not None and name not in biases]
    for method, slots in named.items():
        for slot in slots:
            has_it = isinstance(getattr(layer, slot.tensor, None), Tensor)
            known = near(slot.tensor, weights)
            require(has_it, f"{method}() names the weight {slot.tensor!r}, which the layer does not have. {known}")
            require(
                slot.tensor not in layer._buffers,
                f"{method}() names {slot.tensor!r}, a buffer that no update can be merged into for good. A weight is a "
                "parameter of the layer",
            )
            require(
                not isinstance(getattr(type(layer), slot.tensor, None), property),
                f"{method}() names {slot.tensor!r}, a property that no update can be merged into for good. Name the "
                f"parameters that it is computed from, a slot for each. {known}",
            )
            yield slot, detached_weight(layer, slot.tensor)


@as_check(
    "layout",
    "to_matrix views each weight as a matrix (out, in), and from_matrix lays such a matrix out as the weight: "
    "inverses of each other, that move values and compute nothing",
    "from_matrix transposes where to_matrix does not, to_matrix scales, or a grouped weight's rows are counted "
    "wrongly; or slots() or parts() names a weight that the layer does not have.",
)
def _layout(case: LayerCase) -> None:
    layer = case.model().layer
    for slot, weight in _named_weights(case, layer):
        matrix = case.plugin.to_matrix(weight)
        name = repr(slot.tensor)
        require(matrix.dim() == 2, f"to_matrix makes {tuple(matrix.shape)} of {name}, {tuple(weight.shape)}")
        require(matrix.dtype == weight.dtype, f"to_matrix makes {matrix.dtype} of {name}, {weight.dtype}")
        _moves_values(case, weight, name)
        require_close(f"from_matrix(to_matrix(W)) of {name}", case.plugin.from_matrix(matrix, weight.shape), weight, 0)
        other = torch.randn_like(matrix)
        laid_out = case.plugin.from_matrix(other, weight.shape)
        require_close(f"to_matrix(from_matrix(M)) of {name}", case.plugin.to_matrix(laid_out), other, 0)
        rows = len(matrix)
        start, stop, total = slot.rows or (0, rows, rows)
        require(
            0 <= start < stop <= total == rows, f"the slot of {name} has rows={slot.rows}, and its matrix {rows} rows"
        )
    for slots in (case.plugin.slots(layer), case.plugin.parts(layer).values()):
        for first, second in combinations(slots, 2):
            require(not _overlap(first, second), f"the parts {first.part!r} and {second.part!r} have rows in common")


def _moves_values(case: LayerCase, weight: Tensor, name: str) -> None:
    """Requires that the matrix of a weight whose values are 1, 2, 3, ... holds each of them once."""
    values = torch.arange(1, weight.numel() + 1, dtype=weight.dtype, device=weight.device)
    found = case.plugin.to_matrix(values.view(weight.shape)).flatten().sort().values
    require_close(f"the sorted values of to_matrix(W) for a {name} of 1, 2, 3, ...", found, values, 0)


def _overlap(one: Slot, other: Slot) -> bool:
    if one.tensor != other.tensor:
        return False
    return one.rows is None or other.rows is None or max(one.rows[0], other.rows[0]) < min(one.rows[1], other.rows[1])


@as_check(
    "law",
    "the adapted layer computes in float64 what the untouched layer computes with W + scaling * B @ A",
    "branch leaves out an option of the layer (bias, stride, padding, groups), term.scaling or a slot's rows, or "
    "gives an output of another form; or branch_types has a class whose forward does more.",
)
def _law(case: LayerCase) -> None:
    for parts in case.selections():
        for fields in _SETTINGS:
            model = case.model()
            lora = case.adapt(model, fused_parts=parts, **fields)
            for training in (False, True):
                _follows_the_law(case, model.train(training), f"of {parts or 'the whole layer'} with {fields}")
            lora.set_adapter("default", trainable=False)
            _follows_the_law(case, model.eval(), "of an adapter that is not trained")
            for name, value in updated(case.plugin, model.layer, {"default": 1.0}).items():
                require_close(f"layer.{name}, read from outside,", getattr(model.layer, name), value)


def _follows_the_law(case: LayerCase, model: Holder, what: str) -> None:
    inputs, reference = case.arguments(model.layer), lawful(case, model)
    where = f"in {'training' if model.training else 'eval'} mode"
    has_form = case.has_branch and _has_one_form(case, model.training)  # without a branch it is the layer's own
    for name, context in MODES.items():
        with context():
            got, expected = call(model, inputs), call(reference, inputs)
        require_all_close(f"the output {where}{name}, {what},", got, expected)
        if has_form:
            require_same_form(f"the output {where}{name}, {what},", got, expected)


def _has_one_form(case: LayerCase, training: bool) -> bool:
    """Whether two untouched layers give the same form, one in its second call: those that count their calls do not."""
    one, other = case.model().train(training), case.model().train(training)
    inputs = case.arguments(one.layer)
    call(other, inputs)
    try:
        require_same_form("", call(other, inputs), call(one, inputs))
    except MismatchError:
        return False
    return True


@as_check(
    "gradients",
    "in training and eval mode A, B, biases and inputs get the gradients of the law, not all zero for A and B",
    "branch detaches something, works in place on a tensor that autograd needs, or has an autograd function with a "
    "wrong backward.",
)
def _gradients(case: LayerCase) -> None:
    for parts in case.selections():
        for fields in _SETTINGS:
            model = case.adapted(fused_parts=parts, **fields)
            evaluated = _lawful_gradients(case, model.eval(), lawful(case, model))
            trained = _lawful_gradients(case, model.train(), lawful(case, model))  # the last: it may change statistics
            # In eval mode alone there may be none, as of a layer that keeps there what it computes from its weight.
            both = {name: gradient.abs() + evaluated[name].abs() for name, gradient in trained.items()}
            _require_something(both, "eval and training mode")


def compare_gradients(case: LayerCase, model: Holder, reference: Holder, tolerance: float = TIGHT) -> None:
    """Requires the gradients of the law, some for each factor, whether the inputs need some or not."""
    found = _lawful_gradients(case, model, reference, tolerance)
    _require_something(found, "training mode" if model.training else "eval mode")


def _lawful_gradients(case: LayerCase, model: Holder, reference: Holder, tolerance: float = TIGHT) -> dict[str, Tensor]:
    """Requires the gradients of the law, whether the inputs need some or not; returns those of the factors by name."""
    inputs = case.arguments(model.layer)
    leaves = named_leaves(model.layer)
    others = _trained_beside(model.layer)
    same = dict(reference.layer.named_parameters())
    for free in ([], [x.requires_grad_() for x in inputs if is_values(x)]):
        names = [*leaves, *others, *["an input" for _ in free]]
        expected = _gradients_of(reference, inputs, [*leaves.values(), *(same[name] for name in others), *free])
        got = _gradients_of(model, inputs, [*leaves.values(), *others.values(), *free])
        for name, first, second in zip(names, got, expected, strict=True):
            require_close(f"the gradient of {name}", first, second, tolerance)
    return dict(zip(leaves, got, strict=False))


def _require_something(gradients: Mapping[str, Tensor], where: str) -> None:
    """Raises an `EvidentError` if one of the gradients, which are right, proves nothing."""
    for name, gradient in gradients.items():
        found = {"zero everywhere": not gradient.any(), "no finite number anywhere": not gradient.isfinite().any()}
        for what, holds in found.items():
            if holds:
                raise EvidentError(
                    f"the gradient of {name} is {what} in {where}, as it is by the law for these inputs. Let inputs() "
                    "make some with which the output depends on the weight"
                )


def _trained_beside(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Lets the parameters of a layer that have no update, as biases, be trained; returns them by name."""
    adapted = {slot.tensor for adapter in layer_state(layer).adapters.values() for slot in adapter.slots}
    others = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if not name.startswith("lora_") and name not in adapted and parameter.is_floating_point()
    }
    for parameter in others.values():
        parameter.requires_grad_()
    return others


def _gradients_of(module: nn.Module, inputs: Sequence[Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    outputs = [tensor for tensor in real_tensors_of(call(module, inputs)) if tensor.requires_grad]
    if not outputs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    loss = torch.stack([uneven_sum(tensor) for tensor in outputs])
    # The reference is the same tensors each time: its weights were computed once.
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


@as_check(
    "several",
    "several active adapters add up, and a weighted combination is the sum of their weighted updates",
    "branch uses terms[0], or its slot, or the first two, instead of looping over all terms; or slots() tests the "
    "class by type(layer), which is another one once the layer is adapted.",
)
def _several(case: LayerCase) -> None:
    model = case.model()
    lora = case.adapt(model)
    lora.add_adapter("second", config_like(lora, r=2, alpha=1.0))
    lora.add_adapter("third", config_like(lora, r=1, alpha=2.0))
    every = {"default": 1.0, "second": 1.0, "third": 1.0}
    lora.set_adapter(list(every))
    inputs = case.arguments(model.layer)
    require_lawful("the output with three adapters", case, model, inputs, weights=every)
    compare_gradients(case, model.train(), lawful(case, model, every))
    lora.add_weighted_adapter(["default", "second"], [0.5, 2.0], "combined")
    lora.set_adapter("combined")
    weights = {"default": 0.5, "second": 2.0}
    require_lawful("the output of a weighted combination", case, model, inputs, weights=weights)
    for first, second in combinations(case.selections()[1:], 2):
        require_sum(case, {"fused_parts": first}, {"fused_parts": second})


LAW_CHECKS: tuple[Check[LayerCase], ...] = (_registration, _layout, _law, _gradients, _several)
