"""Checks of how an adapted layer may be called, of what a call may not leave behind, and of mixed batches."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lora_plugins.inplace import base_class_of
from lora_plugins.model import LoraModel
from lora_plugins.plugins import PLAIN
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.layer_case import (
    VARIANT,
    Holder,
    LayerCase,
    add_second,
    batched,
    call,
    config_like,
    is_dense,
    lawful,
    mapped,
    moved,
    runs,
)
from lora_plugins.testing.layer_dtypes import HALVES, NEAR, cancelling
from lora_plugins.testing.required import (
    MODES,
    copied,
    move_values,
    random_states,
    require,
    require_all_close,
    require_nothing_kept,
    tensors_left,
    tensors_of,
)

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""What messages call it, and the arguments."""


@as_check(
    "calls",
    "the adapted layer can be called in every way that the untouched one can: with an empty batch, without one, "
    "with inputs that are not contiguous, with keywords",
    "branch calls view where reshape is meant, or counts on a number of dimensions or rows.",
)
def _calls(case: LayerCase) -> None:
    model = case.adapted()
    for training in (False, True):
        untouched, reference = case.model().train(training), lawful(case, model.train(training))
        for what, inputs, named in _ways(model, case.arguments(model.layer)):
            if runs(untouched, inputs, **named):
                _lawful_in_every_mode(what, model, reference, inputs, named)


def _lawful_in_every_mode(
    what: str, model: Holder, reference: Holder, inputs: Sequence[Any], named: dict[str, Any]
) -> None:
    for mode, context in MODES.items():
        with context():
            got, expected = call(model, inputs, **named), call(reference, inputs, **named)
        require_all_close(f"the output {what}{mode}", got, expected)


def _ways(model: Holder, inputs: tuple[Any, ...]) -> Iterator[Call]:
    """Yields ways to call a layer; not every layer can be called in all of them."""
    rows, tensors = batched(inputs), [is_dense(x) and x.dim() > 1 for x in inputs]
    if any(rows):
        yield "of a batch of none", mapped(inputs, lambda x: x[:0], rows), {}
        yield "of a batch of one", mapped(inputs, lambda x: x[:1], rows), {}
        yield "without a batch", mapped(inputs, lambda x: x[0], rows), {}
        yield "with one more dimension", mapped(inputs, lambda x: x[None], rows), {}
        yield "of a batch that repeats one row", mapped(inputs, lambda x: x[:1].expand_as(x), rows), {}
    if any(tensors):
        yield (
            "of inputs that are not contiguous",
            mapped(inputs, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), tensors),
            {},
        )
    pictures = [is_dense(x) and x.dim() == 4 for x in inputs]
    if any(pictures):
        yield (
            "of channels_last",
            mapped(inputs, lambda x: x.contiguous(memory_format=torch.channels_last), pictures),
            {},
        )
    names = _names(model.layer, len(inputs)) if model.form is None else []
    if names:
        yield "called with keywords", (), dict(zip(names, inputs, strict=True))
        yield "called with one keyword", inputs[:-1], {names[-1]: inputs[-1]}


def _names(layer: nn.Module, count: int) -> list[str]:
    """Returns the names of the first parameters of a layer's own forward; none if they cannot be keywords."""
    parameters = [*inspect.signature(base_class_of(layer).forward).parameters.values()][1 : count + 1]
    named = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return [parameter.name for parameter in parameters] if named and len(parameters) == count else []


@as_check(
    "pure",
    "a call changes nothing but what the untouched layer changes, keeps nothing, and sees weights and factors as "
    "they are now, with gradients and without",
    "branch works in place on its input, on A or on B, draws random numbers, or keeps tensors between calls; or "
    "the layer keeps what it computes from its weight, which a property in class_attributes has to prevent.",
)
def _pure(case: LayerCase) -> None:
    for training in (False, True):
        model = case.adapted().train(training)
        _leaves_alone(case, model)
        _sees_what_changes(case, model)
    _keeps_nothing(case, model.eval())


def _keeps_nothing(case: LayerCase, model: Holder) -> None:
    """Requires that a call keeps no more tensors than one of the untouched layer does."""
    untouched = case.model().eval()

    def calls(called: Holder) -> Callable[[int], Any]:
        return lambda seed: call(called, case.arguments(called.layer, seed))

    if tensors_left(calls(model)):
        its_own = tensors_left(calls(untouched))
        with torch.set_grad_enabled(not its_own):  # of an output that a layer keeps, an update makes the graph larger
            require_nothing_kept(calls(model), besides=tensors_left(calls(untouched)))


def _sees_what_changes(case: LayerCase, model: Holder) -> None:
    """Requires the law after weights and factors were written to, of a model that was called in every mode before."""
    move_values(model.parameters())
    inputs, reference = case.arguments(model.layer), lawful(case, model)
    for name, context in MODES.items():
        with context():
            got, expected = call(model, inputs), call(reference, inputs)
        require_all_close(f"the output{name} after weights and factors changed", got, expected)


def _leaves_alone(case: LayerCase, model: Holder) -> None:
    """Requires that a call changes nothing that the untouched layer leaves alone."""
    untouched = case.model().train(model.training)
    for name, context in MODES.items():
        inputs, plain = case.arguments(model.layer), case.arguments(model.layer)
        with context():
            expected, got = _what_moves(untouched, plain), _what_moves(model, inputs)
        require(got <= expected, f"a call{name} changes {sorted(got - expected)}")


def _what_moves(module: nn.Module, inputs: Sequence[Any]) -> set[str]:
    """Returns what a call changes."""

    def seen() -> dict[str, Any]:
        tensors = {f"the input {at}": x for at, x in enumerate(inputs) if isinstance(x, Tensor)}
        return {
            **copied({**module.state_dict(), **tensors}),
            **{f"the random numbers of {whose}": state for whose, state in random_states().items()},
            "whether gradients are computed": torch.is_grad_enabled(),
            "the default type": torch.get_default_dtype(),
        }

    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    before = seen()
    module(*inputs)
    after = seen()
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    return {what for what, value in before.items() if not _same(value, after[what])}


def _same(first: Any, second: Any) -> bool:
    has_tensors = isinstance(first, list) and any(isinstance(each, Tensor) for each in first[:1])
    return all(map(torch.equal, first, second)) if has_tensors else bool(first == second)


@as_check(
    "base",
    "the updates are added to the weights in base, which need be no parameters, and may have others merged",
    "branch or mixed reads layer.weight instead of base['weight'].",
)
def _base(case: LayerCase) -> None:
    """Requires the law of a layer whose weights are no parameters, with merged updates in them or not."""
    model = case.model().eval()
    for tensor in {slot.tensor: None for slot in case.slots()}:
        prune.identity(model.layer, tensor)  # type: ignore[no-untyped-call]
    lora = case.adapt(model)
    add_second(lora)
    inputs, reference = case.arguments(model.layer), lawful(case, model, {"default": 1.0, "second": 1.0})
    require_all_close("the output of a pruned layer", call(model, inputs), call(reference, inputs))
    lora.merge_adapter("default")
    require_all_close("its output with one of two adapters merged", call(model, inputs), call(reference, inputs))


@as_check(
    "mixed",
    "in a mixed batch, each row has the output of its own adapter or of the base, if the plugin has mixed",
    "adapters.index is left out, the last adapter is not the zero of the base, the scaling, which is in B, is "
    "applied again, or adapters.factors, which branch_takes_rescaling=True promises to take, are not.",
)
def _mixed(case: LayerCase) -> None:
    if not case.can_mix:
        return
    ways: list[dict[str, Any]] = [{"fused_parts": parts} for parts in case.selections()]
    if case.plugin.branch_takes_rescaling:
        ways.append({"variant": VARIANT})
    for fields in ways:
        model = case.model().eval()
        lora = case.adapt(model, **fields, dropout=0.0 if case.plugin.lookup else 0.5)
        lora.add_adapter("second", config_like(lora, r=2, alpha=1.0))
        lora.add_adapter("third", config_like(lora, r=1, alpha=2.0, variant=PLAIN))
        moved(model)
        _mixed_rows(case, model, lora)
    for dtype in HALVES:
        for rounded in "AB":
            _mixed_in_half(case, cancelling(case, dtype, rounded), dtype)
    _mixed_under_autocast(case)


def _mixed_rows(case: LayerCase, model: Holder, lora: LoraModel) -> None:
    """Requires of every way to call a layer that each row of a batch gets the update of its own adapter."""
    references = _references(case, model, ("default", "second", "third"))
    arguments = case.arguments(model.layer)
    for what, inputs, named in [("of rows", arguments, {}), *_ways(model, arguments)]:
        if not _goes_by_rows(case.model().eval(), inputs, named):
            continue
        count = len((*inputs, *named.values())[0])
        rows = [("third", None, "second", "default")[at % 4] for at in range(count)]
        for mode, context in MODES.items():
            with context(), lora.mixed_batch(rows):
                got = _call_mixed(model, inputs, named)
            if got is not None:
                expected = _chosen(references, rows, inputs, named)
                require_all_close(f"the output of a mixed batch {what}{mode}", got, expected)


def _goes_by_rows(module: nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> bool:
    """Whether an untouched layer computes each row of its output from that row of its inputs."""
    every = (*inputs, *named.values())
    rows = batched(every)
    if not rows[0] or not runs(module, inputs, **named):
        return False
    cut = mapped(every, lambda x: x[:1], rows)
    single, names = cut[: len(inputs)], dict(zip(named, cut[len(inputs) :], strict=True))
    if not runs(module, single, **names):
        return False
    pairs = zip(tensors_of(call(module, inputs, **named)), tensors_of(call(module, single, **names)), strict=True)
    return all(len(full) == len(every[0]) and torch.allclose(full[:1], one) for full, one in pairs if full.dim())


def _call_mixed(model: Holder, inputs: Sequence[Any], named: dict[str, Any]) -> Any:
    """Calls a model; None where a plugin says that it cannot mix adapters in such a call."""
    try:
        return call(model, inputs, **named)
    except NotImplementedError:
        return None


def _references(case: LayerCase, model: Holder, names: Sequence[str]) -> dict[str | None, Holder]:
    dtype = next(p.dtype for p in model.layer.parameters() if p.is_floating_point())
    return {None: case.model(dtype).eval(), **{name: lawful(case, model, {name: 1.0}) for name in names}}


def _chosen(
    references: dict[str | None, Holder], rows: Sequence[str | None], inputs: Sequence[Any], named: dict[str, Any]
) -> list[Tensor]:
    """Returns the outputs of a batch, each row from the model of its adapter."""
    outputs = {name: tensors_of(call(model, inputs, **named)) for name, model in references.items()}
    return [
        torch.stack([outputs[row][at][i] for i, row in enumerate(rows)]) if rows else base
        for at, base in enumerate(outputs[None])
    ]


def _mixed_in_half(case: LayerCase, model: Holder, dtype: torch.dtype) -> None:
    """Requires that the factors of a mixed batch are not rounded to a half precision, and its output is."""
    if runs(case.model(dtype).eval(), case.arguments(model.layer)):
        _mixed_near(case, model, f"on a base of {dtype}")


def _mixed_under_autocast(case: LayerCase) -> None:
    model = case.adapted(torch.float32).eval()
    with torch.autocast(case.device.type, torch.bfloat16):
        if runs(case.model(torch.float32).eval(), case.arguments(model.layer)):
            _mixed_near(case, model, "under autocast")


def _mixed_near(case: LayerCase, model: Holder, where: str) -> None:
    inputs = case.arguments(model.layer)
    rows = [("default", None)[at % 2] for at in range(len(inputs[0]))]
    with LoraModel(model).mixed_batch(rows):
        got = _call_mixed(model, inputs, {})
    if got is not None:
        expected = _chosen(_references(case, model, ["default"]), rows, inputs, {})
        require_all_close(f"the output of a mixed batch {where}", got, expected, NEAR)


CALL_CHECKS: tuple[Check[LayerCase], ...] = (_calls, _pure, _base, _mixed)
