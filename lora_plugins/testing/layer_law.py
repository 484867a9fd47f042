"""Checks of the law: what an adapted layer computes, and its gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.errors import TargetError
from lora_plugins.inplace import base_class_of, detached_weight
from lora_plugins.model import LoraModel
from lora_plugins.plugins import LayerPlugin, class_path
from lora_plugins.testing.check import Check, refuse, require, require_all_close, require_close, tensors_of
from lora_plugins.testing.layer_case import Holder, LayerCase, adapter_leaves, call, lawful, updated


def _registration(case: LayerCase) -> None:
    layer = case.model().layer
    found = case.registry().layer_for(type(layer))
    require(
        found is case.plugin, f"a {class_path(type(layer))} was built, and module_type is {case.plugin.module_type!r}"
    )
    require(bool(case.slots()), "slots() is empty")


def _layout(case: LayerCase) -> None:
    layer = case.model().layer
    for slot in (*case.slots(), *case.plugin.parts(layer).values()):
        weight = detached_weight(layer, slot.tensor)
        matrix = case.plugin.to_matrix(weight)
        name = repr(slot.tensor)
        require(matrix.dim() == 2, f"to_matrix makes {tuple(matrix.shape)} of {name}, {tuple(weight.shape)}")
        require_close(f"from_matrix(to_matrix(W)) of {name}", case.plugin.from_matrix(matrix, weight.shape), weight, 0)
        other = torch.randn_like(matrix)
        laid_out = case.plugin.from_matrix(other, weight.shape)
        require_close(f"to_matrix(from_matrix(M)) of {name}", case.plugin.to_matrix(laid_out), other, 0)
        rows = len(matrix)
        start, stop, total = slot.rows or (0, rows, rows)
        require(
            0 <= start < stop <= total == rows, f"the slot of {name} has rows={slot.rows}, and its matrix {rows} rows"
        )


def _law(case: LayerCase) -> None:
    for parts in case.selections():
        for training in (False, True):
            model = case.adapted(fused_parts=parts).train(training)
            inputs = case.arguments(model.layer)
            where = f"in {'training' if training else 'eval'} mode{f', of {parts}' if parts else ''}"
            require_all_close(f"the output {where}", call(model, inputs), call(lawful(case, model), inputs))
            for name, value in updated(case.plugin, model.layer, {"default": 1.0}).items():
                require_close(f"layer.{name}, read from outside,", getattr(model.layer, name), value)


def _gradients(case: LayerCase) -> None:
    for parts in case.selections():
        model = case.adapted(fused_parts=parts).train()
        _compare_gradients(model, lawful(case, model), case.arguments(model.layer), adapter_leaves(model.layer))


def _compare_gradients(
    model: nn.Module, reference: nn.Module, inputs: Sequence[Any], leaves: Sequence[nn.Parameter]
) -> None:
    inputs = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    free = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    named = {f"lora_{'AB'[i % 2]}": leaf for i, leaf in enumerate(leaves)}
    expected = _gradients_of(reference, inputs, [*leaves, *free])
    got = _gradients_of(model, inputs, [*leaves, *free])
    names = [*(list(named) * (len(leaves) // max(len(named), 1))), *["an input"] * len(free)]
    for name, first, second in zip(names, got, expected, strict=True):
        require_close(f"the gradient of {name}", first, second)
    for name, gradient in zip(names, got[: len(leaves)], strict=False):
        require(bool(gradient.any()), f"the gradient of {name} is zero everywhere")


def _gradients_of(module: nn.Module, inputs: Sequence[Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    outputs = [tensor for tensor in tensors_of(call(module, inputs)) if tensor.requires_grad]
    require(bool(outputs), "the output needs no gradient")
    loss = torch.stack(
        [(tensor * torch.linspace(-1, 2, tensor.numel()).view(tensor.shape)).sum() for tensor in outputs]
    )
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


def _several(case: LayerCase) -> None:
    model = case.model()
    lora = case.adapt(model)
    lora.add_adapter("second", _config(lora, r=2, alpha=1.0))
    lora.set_adapter(["default", "second"])
    reference = lawful(case, model, {"default": 1.0, "second": 1.0})
    inputs = case.arguments(model.layer)
    require_all_close("the output with two adapters", call(model, inputs), call(reference, inputs))
    _compare_gradients(model, reference, inputs, adapter_leaves(model.layer))
    lora.add_weighted_adapter(["default", "second"], [0.5, 2.0], "combined")
    reference = lawful(case, model, {"default": 0.5, "second": 2.0})
    lora.set_adapter("combined")
    require_all_close("the output of a weighted combination", call(model, inputs), call(reference, inputs))


def _config(lora: LoraModel, **fields: Any) -> Any:
    config = lora.adapters["default"]
    return type(config)(**{**config.to_dict(), **fields})


def _dropout(case: LayerCase) -> None:
    base = base_class_of(case.model().layer)
    plugin = case.plugin
    known = class_path(base) in {class_path(cls) for cls in plugin.branch_types}
    if not known or plugin.branch_use == "never" or plugin.lookup:
        _dropout_is_refused(case)
        return
    model = case.adapted(dropout=0.5).train()
    inputs = case.arguments(model.layer)
    outputs = [tensors_of(call(model, inputs, seed))[0].detach() for seed in range(300)]
    require(any(not torch.equal(outputs[0], other) for other in outputs), "with dropout=0.5 every output is the same")
    untouched = tensors_of(call(case.model().train(), inputs))[0].detach()
    branch = tensors_of(call(lawful(case, model), inputs))[0].detach() - untouched
    mean = torch.stack(outputs).mean(0) - untouched
    size = float(branch.abs().mean())
    error = float((mean - branch).abs().mean())
    # Dropping is linear in the branch's input, so its mean over many draws is the branch; 0.25 is over four deviations.
    require(error < 0.25 * size, f"the mean over 300 draws is off by {error / size:.0%} of the branch")
    idle = case.adapted(dropout=0.5).train()
    with torch.no_grad():
        for parameter in adapter_leaves(idle.layer):
            parameter.zero_()
    require_close("the output with dropout=0.5 and an update of zero", tensors_of(call(idle, inputs))[0], untouched)
    model.eval()
    require_all_close("the output in eval mode", call(model, inputs), call(lawful(case, model), inputs))


def _dropout_is_refused(case: LayerCase) -> None:
    model = case.model()
    try:
        case.adapt(model, dropout=0.5)
    except TargetError:
        require(type(model.layer) is type(case.model().layer), "the refusal changed the layer")
        return
    refuse("a layer without a branch accepted dropout=0.5")


def _inputs(case: LayerCase) -> None:
    if type(case.plugin).inputs is LayerPlugin.inputs:
        return
    model: Holder = case.model().eval()
    arguments = case.arguments(model.layer)
    slots = case.slots()
    weights = [model.layer.get_parameter(slot.tensor) for slot in slots]
    output = torch.cat([tensor.flatten() for tensor in tensors_of(call(model, arguments)) if tensor.requires_grad])
    gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), weights)
    for slot, gradient in zip(slots, gradients, strict=True):
        matrix = case.plugin.to_matrix(gradient)
        start, stop, _ = slot.rows or (0, len(matrix), len(matrix))
        vectors = case.plugin.inputs(model.layer, slot, *arguments).detach()
        require(
            vectors.dim() == 2 and vectors.shape[1] == matrix.shape[1],
            f"inputs() gave {tuple(vectors.shape)}, where the weight's matrix has {matrix.shape[1]} columns",
        )
        # The gradient of M in M @ x is a sum of outer products with x: its rows are combinations of the inputs.
        rows = matrix[start:stop]
        rest = rows - rows @ torch.linalg.pinv(vectors) @ vectors
        require(
            float(rest.abs().max()) <= 1e-8 * float(rows.abs().max()),
            "the weight's gradient is no combination of the vectors that inputs() gave",
        )


LAW_CHECKS: tuple[Check[LayerCase], ...] = (
    Check(
        "registration",
        _registration,
        "the registrar takes the plugin, the layer that was built is of its module_type, and it has a slot",
        "an attribute such as name or module_type is missing or misspelt, or build() makes another class.",
    ),
    Check(
        "layout",
        _layout,
        "to_matrix views each weight as a matrix (out, in), and from_matrix lays such a matrix out as the weight: "
        "inverses of each other, that move values and compute nothing",
        "from_matrix transposes where to_matrix does not, or a grouped weight's rows are counted wrongly.",
    ),
    Check(
        "law",
        _law,
        "the adapted layer computes in float64 what the untouched layer computes with W + scaling * B @ A",
        "branch leaves out an option of the layer (bias, stride, padding, groups), the scaling or a slot's rows; or "
        "branch_types has a class whose forward does more.",
    ),
    Check(
        "gradients",
        _gradients,
        "A, B and the inputs get the gradients that the law gives them, not zero for A and B",
        "branch detaches something, works in place on a tensor that autograd needs, or has an autograd function with a "
        "wrong backward.",
    ),
    Check(
        "several",
        _several,
        "several active adapters add up, and a weighted combination is the sum of their weighted updates",
        "branch uses terms[0] instead of looping over all terms.",
    ),
    Check(
        "dropout",
        _dropout,
        "in training mode dropout acts on the branch's input and on nothing else; in eval mode not at all; a layer "
        "without a branch for its class refuses it",
        "branch does not call term.drop(x), drops the input of the base as well, or drops something other than x.",
    ),
    Check(
        "inputs",
        _inputs,
        "inputs() gives the vectors (n, in) that the weight's matrix is multiplied by, if the plugin has it",
        "the vectors have another order of dimensions than the columns of to_matrix(weight).",
    ),
)
