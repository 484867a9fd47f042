"""The conformance kit for variants: one call that checks a plugin."""

import copy
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_plugins.adapter import adapter_parameters
from lora_plugins.devices import usable_device
from lora_plugins.errors import ConfigError, PluginError, near
from lora_plugins.inplace import layer_state, own_tensors_of, slot_tensors
from lora_plugins.model import LoraModel
from lora_plugins.plugins import VariantPlugin
from lora_plugins.testing import check as checks
from lora_plugins.testing.check import (
    MODES,
    Check,
    Named,
    by_name,
    chosen,
    random_states,
    require,
    require_close,
    require_nothing_kept,
    require_same_state,
    require_unmoved,
)
from lora_plugins.testing.variant_case import LAYERS, VariantCase, deltas, move

_BELOW_FLOAT32 = 2.0**-30
"""A relative change that float64 shows and float32 does not, nor does it for twice as much."""


def _registration(case: VariantCase) -> None:
    case.registry()


def _own_names(case: VariantCase) -> None:
    """Requires that `first_values` gives the tensors of `shapes`, and that `delta_weight` asks for no others."""
    rows, columns, r = 3, 4, 2
    weight, A, B = torch.ones(rows, columns), torch.ones(r, columns), torch.ones(rows, r)
    shapes = case.variant.shapes(rows, columns, r)
    own = Named("first_values() gives", case.variant.first_values(weight, A, B, 1.0))
    for name in own:
        require(
            name in shapes, f"first_values() gives {name!r}, and shapes() has none of that name. {near(name, shapes)}"
        )
    for name in shapes:
        own[name]
    case.variant.delta_weight(weight, A, B, 1.0, own)


def _telling_names(run: Callable[[VariantCase], None], case: VariantCase) -> None:
    """Runs a check; if it fails on an unknown name of the variant's own tensors, the message lists the known ones."""
    try:
        run(case)
    except (KeyError, PluginError):
        _own_names(case)
        raise


def _shapes(case: VariantCase) -> None:
    _own_names(case)
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


def _identity(case: VariantCase) -> None:
    model = case.model()
    before = case.run(model)
    case.adapt(model)
    require_close("the output at the start", case.run(model), before)


def _tensors(lora: LoraModel) -> list[tuple[str, nn.Parameter]]:
    """Returns A, B and the variant's own tensors of each slot, by the names that the variant has for them."""
    planned = lora.plans["default"].layers[0]
    layer = lora.model.get_submodule(planned.name)
    return [pair for slot in planned.slots for pair in slot_tensors(layer, "default", slot).items()]


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


def _scaling(case: VariantCase) -> None:
    for alpha in (0.5, 64.0):
        model = case.model()
        before = case.run(model)
        case.adapt(model, alpha=alpha)
        require_close(f"the output at the start with alpha={alpha}", case.run(model), before)
    one, other = (deltas(case.trained(alpha=alpha)) for alpha in (3.0, 6.0))
    for suffix, term in one.items():
        assert term.delta is not None
        same = torch.equal(term.delta, torch.as_tensor(other[suffix].delta))
        require(not same, "the update is the same with another alpha")


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


def _pure(case: VariantCase) -> None:
    before = random_states()
    lora = case.trained()
    require_unmoved(before)
    state = {key: value.clone() for key, value in lora.model.state_dict().items()}
    first = case.run(lora.model)
    before = random_states()
    case.run(lora.model.train())
    case.run(lora.model.eval())
    require_unmoved(before)
    require_same_state("the model after two calls", lora.model.state_dict(), state)
    require_close("the output, computed again,", case.run(lora.model), first, 0)
    require_nothing_kept(lambda _: case.run(lora.model))
    earlier = deltas(lora)
    for suffix, term in deltas(move(lora)).items():
        same = torch.equal(torch.as_tensor(term.delta), torch.as_tensor(earlier[suffix].delta))
        require(not same, "the update is the same after A, B and the variant's own tensors moved")
    for name, context in MODES.items():
        with context():
            case.run(lora.model)
        expected = case.expected(move(lora))
        with context():
            require_close(
                f"the output{name} after A, B and the variant's own tensors moved", case.run(lora.model), expected
            )


def _zeros(case: VariantCase) -> None:
    """Layers that start at zero, as those that are added to a trained model do, have rows without a direction."""
    model = case.model()
    with torch.no_grad():
        model[0].weight[:2].zero_()  # type: ignore[index]
    before = case.run(model)
    lora = case.adapt(model)
    require_close("the output at the start, where two rows of the weight are zero,", case.run(model), before)
    case.run(move(lora).model).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in adapter_parameters(model[0], "default"):
        require(parameter.grad is not None, "a tensor gets no gradient")
        found = torch.as_tensor(parameter.grad)
        require(bool(found.isfinite().all()), "where two rows of the weight are zero, a gradient is not finite")


def _ranks(case: VariantCase) -> None:
    for r in (1, 9):
        model = case.model()
        before = case.run(model)
        lora = case.adapt(model, r=r)
        require_close(f"the output at the start with r={r}", case.run(model), before)
        move(lora)
        output = case.run(model)
        require(bool(output.isfinite().all()), f"with r={r} the output is not finite")
        factors = {suffix: (term.A, term.B) for suffix, term in deltas(lora).items()}
        for at in range(r):
            before_delta = deltas(lora)
            with torch.no_grad():
                for A, _ in factors.values():
                    A[at] *= 2
            for suffix, term in deltas(lora).items():
                same = torch.equal(torch.as_tensor(term.delta), torch.as_tensor(before_delta[suffix].delta))
                require(not same, f"with r={r} the update does not depend on the rank {at}")


def _device(case: VariantCase) -> None:
    lora = case.trained()
    expected = case.expected(lora)
    x = case.batch()
    # A tensor that is made without saying where lands on the default device, which is none here.
    with torch.device("meta"):
        got = lora.model(x)
    require(not got.is_meta, "the output is on the default device, not on the layer's")
    require_close("the output with another default device", got, expected)


def _base_untouched(case: VariantCase) -> None:
    model = case.model()
    weight = model[0]._parameters["weight"]
    assert weight is not None
    before = weight.detach().clone()
    case.adapt(model, init="none")
    case.run(model).sum().backward()  # type: ignore[no-untyped-call]
    require_close("the base weight after a step", weight, before, 0)


def _merging(case: VariantCase) -> None:
    lora = case.trained()
    plain = {key: value.clone() for key, value in lora.model.state_dict().items() if "lora_" not in key}
    output = case.run(lora.model)
    lora.merge_adapter()
    require_close("the merged output", case.run(lora.model), output)
    lora.unmerge_adapter()
    require_close("the unmerged output", case.run(lora.model), output, 0)
    lora.unload()
    require_same_state("the unloaded model", lora.model.state_dict(), plain)


def _copies(case: VariantCase) -> None:
    lora = case.trained()
    twin = copy.deepcopy(lora.model)
    require_close("the output of a deep copy", case.run(twin), case.run(lora.model), 0)
    state = layer_state(twin[0])  # type: ignore[index]
    require(state.adapters["default"].variant is not None, "the copy has lost its variant")


def _files(case: VariantCase) -> None:
    elsewhere = replace(case, variant=case.elsewhere)
    lora, fresh = case.trained(), case.model()
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(Path(folder))
        LoraModel.load_adapter(fresh, Path(folder), registry=elsewhere.registry())
    require_same_state("the loaded model", fresh.state_dict(), lora.model.state_dict())
    require_close("the output of the loaded model", case.run(fresh), case.run(lora.model), 0)


def _dtype(case: VariantCase) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        lora = case.trained(dtype)
        output = case.run(lora.model, dtype)
        require(output.dtype == dtype, f"the output is of {output.dtype} on a base of {dtype}")
        wrong = {k: v.dtype for k, v in lora.model.state_dict().items() if "lora_" in k and v.dtype != torch.float32}
        require(not wrong, f"on a base of {dtype}, {wrong}")
    _computes_in_float64(case)


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


def _updates(lora: LoraModel) -> Tensor:
    return torch.cat([term.delta_weight().detach().flatten() for term in deltas(lora).values()])


_CHECKS: tuple[Check[VariantCase], ...] = (
    Check(
        "registration", _registration, "the registrar takes the plugin", "name is missing, or an attribute is wrong."
    ),
    Check(
        "shapes",
        _shapes,
        "first_values gives the tensors that shapes announces, with names that can follow lora_, finite",
        "shapes counts inputs where outputs are meant, or returns another set of names than first_values.",
    ),
    Check(
        "identity",
        _identity,
        "the adapted model starts as the untouched one, since B or, in an embedding, A starts at zero",
        "first_values does not belong to the weight it is handed: the init may have changed it.",
    ),
    Check(
        "gradients",
        _gradients,
        "A, B and the variant's own tensors get gradients, which are those of delta_weight",
        "delta_weight works on detached or converted copies, as with .item(), .data or torch.no_grad(); or it does not "
        "hold constant what row_factors holds constant.",
    ),
    Check(
        "trainable",
        _trainable,
        "from the start, A, B and the variant's own tensors all learn",
        "of two factors both start at zero, so that neither gets a gradient. In an embedding it is A that starts at "
        "zero, and B is drawn.",
    ),
    Check(
        "scaling",
        _scaling,
        "the start does not depend on alpha, and the update does",
        "first_values or delta_weight leaves the scaling out.",
    ),
    Check(
        "branch",
        _branch,
        "the layer computes W + delta_weight with gradients and without, in training and, with dropout, on average",
        "delta_weight gives something else in another mode.",
    ),
    Check(
        "pure",
        _pure,
        "delta_weight and first_values change nothing that they are handed, draw no random numbers and keep nothing",
        "an operation in place on A, B or an own tensor, or a tensor kept from an earlier call.",
    ),
    Check(
        "zeros",
        _zeros,
        "rows of zeros in the weight start and learn like others",
        "a division by the norm of a row.",
    ),
    Check("ranks", _ranks, "any rank works, and each rank counts", "delta_weight counts on a number of ranks."),
    Check(
        "device",
        _device,
        "what is made is where the weight is",
        "torch.ones(n) where A.new_ones(n) is meant.",
    ),
    Check(
        "base",
        _base_untouched,
        "delta_weight leaves the weight that it is handed alone",
        "an operation in place, such as weight.add_(...): the weight is the model's own.",
    ),
    Check(
        "merging",
        _merging,
        "merged, the plain layer computes the same; unmerged and unloaded, all bits are what they were",
        "delta_weight returns the new weight instead of by what it changes.",
    ),
    Check(
        "copies",
        _copies,
        "a deep copy of the model computes the same",
        "state is kept on the plugin and not in tensors.",
    ),
    Check(
        "files",
        _files,
        "an adapter that is saved and loaded computes the same bits",
        "delta_weight uses something that is neither a tensor of the adapter nor the weight.",
    ),
    Check(
        "dtype",
        _dtype,
        "A, B and own tensors are float32 on a base in half precision, whose type the output keeps; on one in float64, "
        "the update is computed in that",
        "a fixed type, as torch.ones(n) where A.new_ones(n) is meant, or .float().",
    ),
)

VARIANT_CHECKS: dict[str, Check[VariantCase]] = by_name(_CHECKS)
"""All checks of a variant by name, in the order they are run."""


def check_variant_plugin(
    variant: VariantPlugin,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    device: str | torch.device = "cpu",
) -> None:
    """Checks a variant on a linear layer, whole and in parts, a grouped convolution and an embedding.

    It need not be installed.

    Args:
        variant: The plugin.
        only: Names of the checks to run; all of `VARIANT_CHECKS` by default.
        skip: Names of checks not to run.
        device: Where it is checked, such as "cuda"; it has to know float64.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check of a name, or torch cannot use the device here, or the variant refuses all of
            these layers; those that it refuses are left out.

    Example:
        >>> from lora_plugins.variants.dora import DoraVariant
        >>> check_variant_plugin(DoraVariant())
    """
    selected, place = chosen(VARIANT_CHECKS, only, skip), usable_device(device)
    cases = [VariantCase(variant, checks.elsewhere(variant), layer, place) for layer in LAYERS]
    refusals = [case.refusal() for case in cases]
    if None not in refusals:
        raise ConfigError(f"{type(variant).__name__} refuses all layers of the kit, as the first one: {refusals[0]}.")
    for case, refusal in zip(cases, refusals, strict=True):
        for check in selected if refusal is None else ():
            told = replace(check, run=partial(_telling_names, check.run))
            checks.run(told, case, f"{type(variant).__name__} on {case.layer}")
