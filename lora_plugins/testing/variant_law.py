"""What the kit for variants checks of the law: shapes, values and gradients of `delta_weight`."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter import adapter_parameters
from lora_plugins.errors import near
from lora_plugins.inplace import own_tensors_of, slot_tensors
from lora_plugins.model import LoraModel
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.required import MODES, Named, require, require_close, uneven_sum
from lora_plugins.testing.variant_case import VariantCase, deltas, move
from lora_plugins.utils import in_float64

_BELOW_FLOAT32 = 2.0**-30
"""A relative change that float64 shows and float32 does not, nor does it for twice as much."""

_NEAR = 1e-3
"""Which share of its norm a gradient in float32 may be off by: some roundings, added up."""


def require_own_names(case: VariantCase) -> None:
    """Requires that `first_values` gives the tensors of `shapes`, and that `delta_weight` asks for no others."""
    rows, columns, r = 3, 4, 2
    weight, A, B = torch.ones(rows, columns), torch.ones(r, columns), torch.ones(rows, r)
    shapes = case.variant.shapes(rows, columns, r)
    own = Named("first_values() gives", case.variant.first_values(weight, A, B, 1.0))
    for name in own:
        require(
            name in shapes, f"first_values() gives {name!r}, and shapes() has none of that name. {near(name, shapes)}"
        )
    for name, shape in shapes.items():
        found = tuple(own[name].shape)
        require(found == tuple(shape), f"first_values() gives a {name!r} of {found}, and shapes() says {tuple(shape)}")
    case.variant.delta_weight(weight, A, B, 1.0, own)


@as_check("registration", "the registrar takes the plugin", "name is missing, or an attribute is wrong.")
def _registration(case: VariantCase) -> None:
    case.registry()


@as_check(
    "shapes",
    "first_values gives the tensors that shapes announces, with names that can follow lora_, finite",
    "shapes counts inputs where outputs are meant, or returns another set of names than first_values.",
)
def _shapes(case: VariantCase) -> None:
    require_own_names(case)
    lora = case.adapt(case.model())
    layer = lora.plans["default"].layers[0]
    module = lora.model.get_submodule(layer.name)
    for slot, shape in zip(layer.slots, layer.shapes, strict=True):
        own, shapes = own_tensors_of(module, "default", slot), layer.own_shapes(slot)
        names = [name for name in own if not name.isidentifier() or name in ("A", "B")]
        require(not names, f"tensors are called {names}")
        for name, tensor in own.items():
            require(tensor.shape == torch.Size(shapes[name]), f"{name!r} is {tuple(tensor.shape)}, not {shapes[name]}")
            require(bool(tensor.isfinite().all()), f"{name!r} has values that are not finite")
        for dtype in (torch.float32, torch.float64):
            delta = deltas(case.trained(dtype))[slot.suffix].delta
            found = None if delta is None else (tuple(delta.shape), delta.dtype)
            require(found == (shape, dtype), f"delta_weight gives {found} for a weight of {(shape, dtype)}")
    total = sum(p.numel() for p in lora.model.parameters() if p.requires_grad)
    require(lora.plans["default"].trainable == total, f"the plan counts {lora.plans['default'].trainable} of {total}")


@as_check(
    "identity",
    "the adapted model starts as the untouched one, since B or, in an embedding, A starts at zero",
    "first_values does not belong to the weight it is handed: the init may have changed it.",
)
def _identity(case: VariantCase) -> None:
    _starts_untouched(case, case.model(), "the output at the start")


def _starts_untouched(case: VariantCase, model: nn.Module, what: str, **fields: Any) -> LoraModel:
    """Requires that a model computes what it did once it is adapted."""
    before = case.run(model)
    lora = case.adapt(model, **fields)
    require_close(what, case.run(model), before)
    return lora


def _tensors(lora: LoraModel) -> list[tuple[str, nn.Parameter]]:
    """Returns A, B and the variant's own tensors of each slot, by the names that the variant has for them."""
    planned = lora.plans["default"].layers[0]
    layer = lora.model.get_submodule(planned.name)
    return [pair for slot in planned.slots for pair in slot_tensors(layer, "default", slot).items()]


@as_check(
    "gradients",
    "A, B and the variant's own tensors get gradients, which are those of delta_weight",
    "delta_weight works on detached or converted copies, as with .item(), .data or torch.no_grad(); or it does not "
    "hold constant what row_factors holds constant; or it gives something else in each call, by random numbers or "
    "a count of calls.",
)
def _gradients(case: VariantCase) -> None:
    lora = case.trained()
    tensors = _tensors(lora)
    leaves = [tensor for _, tensor in tensors]
    got, expected = (
        torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)
        for output in (case.run(lora.model), case.expected(lora))
    )
    for (name, _), one, wanted in zip(tensors, got, expected, strict=True):
        moved = one is not None and wanted is not None and bool(one.any())
        require(moved, f"{name!r} gets no gradient")
        require_close(f"the gradient of {name!r}", one, wanted)


@as_check(
    "trainable",
    "from the start, A, B and the variant's own tensors all learn",
    "of two factors both start at zero, so that neither gets a gradient. In an embedding it is A that starts at "
    "zero, and B is drawn.",
)
def _trainable(case: VariantCase) -> None:
    """Requires that each tensor leaves its first value, if need be after others that started at zero left theirs."""
    lora = case.adapt(case.model())
    tensors = _tensors(lora)
    first = [tensor.detach().clone() for _, tensor in tensors]
    for _ in tensors:
        loss = case.run(lora.model).sin().sum()
        with torch.no_grad():
            for (_, tensor), gradient in zip(tensors, torch.autograd.grad(loss, [t for _, t in tensors]), strict=True):
                tensor.sub_(gradient, alpha=0.1)
    still = [name for (name, tensor), value in zip(tensors, first, strict=True) if torch.equal(tensor, value)]
    require(not still, f"after {len(tensors)} steps, {still} have their first values")


@as_check(
    "scaling",
    "the start does not depend on alpha, and the update does",
    "first_values or delta_weight leaves the scaling out.",
)
def _scaling(case: VariantCase) -> None:
    for alpha in (0.5, 64.0):
        _starts_untouched(case, case.model(), f"the output at the start with alpha={alpha}", alpha=alpha)
    one, other = (deltas(case.trained(alpha=alpha)) for alpha in (3.0, 6.0))
    for suffix, term in one.items():
        assert term.delta is not None
        same = torch.equal(term.delta, torch.as_tensor(other[suffix].delta))
        require(not same, "the update is the same with another alpha")


@as_check(
    "branch",
    "the layer computes W + delta_weight with gradients and without, in training and, with dropout, on average",
    "delta_weight gives something else in another mode.",
)
def _branch(case: VariantCase) -> None:
    for dropout in (0.0,) if case.looks_up else (0.0, 0.5):
        lora = case.trained(dropout=dropout)
        expected = case.expected(lora)
        for name, context in MODES.items():
            with context():
                require_close(f"the output{name}", case.run(lora.model), expected)
        if not dropout:
            require_close("the output in training mode", case.run(lora.model.train()), expected)
            continue
        lora.model.train()
        draws = torch.stack([case.run(lora.model).detach() for _ in range(300)])
        update = (expected - case.run(case.model())).detach()
        error = float((draws.mean(0) - expected.detach()).abs().mean() / update.abs().mean())
        # Of the order of the deviation of a mean over 300 draws, a few per cent of the update.
        require(error < 0.25, f"with dropout, the mean over 300 draws is off by {error:.0%} of the update")


@as_check("zeros", "rows of zeros in the weight start and learn like others", "a division by the norm of a row.")
def _zeros(case: VariantCase) -> None:
    """Layers that start at zero, as those that are added to a trained model do, have rows without a direction."""
    model = case.model()
    with torch.no_grad():
        model[0].weight[:2].zero_()  # type: ignore[index]
    lora = _starts_untouched(case, model, "the output at the start, where two rows of the weight are zero,")
    case.run(move(lora).model).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in adapter_parameters(model[0], "default"):
        require(parameter.grad is not None, "a tensor gets no gradient")
        found = torch.as_tensor(parameter.grad)
        require(bool(found.isfinite().all()), "where two rows of the weight are zero, a gradient is not finite")


@as_check("ranks", "any rank works, and each rank counts", "delta_weight counts on a number of ranks.")
def _ranks(case: VariantCase) -> None:
    for r in (1, 9):
        model = case.model()
        lora = _starts_untouched(case, model, f"the output at the start with r={r}", r=r)
        move(lora)
        output = case.run(model)
        require(bool(output.isfinite().all()), f"with r={r} the output is not finite")
        factors = {suffix: (term.A, term.B) for suffix, term in deltas(lora).items()}
        for at in range(r):
            before_delta = deltas(lora)
            with torch.no_grad():
                for A, _ in factors.values():
                    A[at] *= torch.linspace(1.5, 2.5, A.shape[1], dtype=A.dtype, device=A.device)  # not its norm alone
            for suffix, term in deltas(lora).items():
                same = torch.equal(torch.as_tensor(term.delta), torch.as_tensor(before_delta[suffix].delta))
                require(not same, f"with r={r} the update does not depend on the rank {at}")


@as_check(
    "dtype",
    "A, B and own tensors are float32 on a base in half precision, whose type the output keeps; on one in float64, "
    "the update is computed in that, and gradients in float32 are near those in float64",
    "a fixed type, as torch.ones(n) where A.new_ones(n) is meant, or .float(); or what is detached in some types.",
)
def _dtype(case: VariantCase) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        lora = case.trained(dtype)
        output = case.run(lora.model, dtype)
        require(output.dtype == dtype, f"the output is of {output.dtype} on a base of {dtype}")
        wrong = {k: v.dtype for k, v in lora.model.state_dict().items() if "lora_" in k and v.dtype != torch.float32}
        require(not wrong, f"on a base of {dtype}, {wrong}")
    _computes_in_float64(case)
    _learns_in_float32(case)


def _computes_in_float64(case: VariantCase) -> None:
    """Requires that the update depends on what only float64 shows of each tensor."""
    lora = case.trained()
    for name, tensor in _tensors(lora):
        before = _updates(lora)
        # Each value by another factor: a softmax does not see a common one.
        each = torch.linspace(1, 2, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view_as(tensor)
        with torch.no_grad():
            tensor.mul_(1 + _BELOW_FLOAT32 * each)
        same = torch.equal(_updates(lora), before)
        require(not same, f"in float64 the update is the same for a change of {name!r} that float32 does not show")


def _learns_in_float32(case: VariantCase) -> None:
    """Requires that gradients in float32 are near those of the same values in float64."""
    lora, wide = case.trained(torch.float32), case.trained(torch.float32)
    wide.model.double()
    pairs = zip(_tensors(lora), _gradients_in(case, lora, torch.float32), _gradients_in(case, wide), strict=True)
    for (name, _), found, expected in pairs:
        require(found is not None, f"in float32, {name!r} gets no gradient")
        off, norm = float((in_float64(torch.as_tensor(found)) - expected).norm()), float(expected.norm())
        # Written so that NaN fails.
        require(off <= _NEAR * norm, f"in float32, the gradient of {name!r}, of norm {norm:.2g}, is off by {off:.2g}")


def _gradients_in(case: VariantCase, lora: LoraModel, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    leaves = [tensor for _, tensor in _tensors(lora)]
    return torch.autograd.grad(uneven_sum(case.run(lora.model, dtype)), leaves, allow_unused=True)


def _updates(lora: LoraModel) -> Tensor:
    return torch.cat([term.delta_weight().detach().flatten() for term in deltas(lora).values()])


LAW_CHECKS: tuple[Check[VariantCase], ...] = (
    _registration,
    _shapes,
    _identity,
    _gradients,
    _trainable,
    _scaling,
    _branch,
    _zeros,
    _ranks,
    _dtype,
)
"""Checks of what a variant computes."""
