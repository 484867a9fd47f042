"""Compares a model with the reference: names, bits, what is trained, outputs and gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_plugins import LoraModel, StateError
from tests.state.reference import ROUNDINGS, Reference, Result
from tests.state.zoo import Zoo


class DivergenceError(AssertionError):
    """The model is not what the reference says.

    Args:
        check: What was compared, in short; divergences are grouped by it.
        detail: What came and what was expected.
    """

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"{check}: {detail}")
        self.check, self.detail = check, detail


DROPPED = 3e-3
"""What the smallest dropout, which drops 1 of 65,536 elements, changes by its scale alone."""


def tolerance(dtype: torch.dtype, size: float = 1.0) -> float:
    """The share of the largest value of a tensor by which a computation in this type may be off.

    Args:
        dtype: The type.
        size: The largest weight. Beyond 4, where training and merging may lead, two layers of it magnify what the
            first one rounded, and attention the difference of what it compares.
    """
    return ROUNDINGS * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 16) * max(1.0, size / 4) ** 2


def check(model: Zoo, lora: LoraModel | None, reference: Reference, inputs: tuple[Tensor, Tensor]) -> None:
    """Compares everything.

    Raises:
        DivergenceError: At the first difference.
    """
    check_handle(lora, reference)
    check_state(model, reference)
    check_outputs(model, reference, inputs)
    check_training(model, reference, inputs)


def check_handle(lora: LoraModel | None, reference: Reference) -> None:
    """Compares what the handle tells; inside of a context it is not said what acts."""
    if lora is None:
        return
    if not reference.adapters:
        try:
            _ = lora.active_adapters
        except StateError:
            return
        raise DivergenceError("handle", "a model without adapters tells which are active")
    _same("adapters", sorted(lora.adapters), sorted(reference.adapters))
    if not reference.contexts:
        _same("active_adapters", lora.active_adapters, reference.active)
        weights = {name: reference.weights.get(name, 1.0) for name in reference.active}
        _same("active_weights", lora.active_weights, weights)
        _same("merged_adapters", lora.merged_adapters, reference.merged)


def check_state(model: Zoo, reference: Reference) -> None:
    """Compares names and bits of all tensors, what requires a gradient, modes, and classes once unloaded."""
    found, expected = model.state_dict(), reference.state_dict()
    _same("state dict keys", sorted(found), sorted(expected))
    see(found, reference)
    expected = reference.state_dict()
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype:
            raise DivergenceError("type", f"{name} is {found[name].dtype}, expected {tensor.dtype}")
        if not torch.equal(found[name], tensor):
            off = float((found[name].double() - tensor.double()).abs().max())
            raise DivergenceError(
                "bits of " + ("A, B" if "lora_" in name else "the base"), f"{name} is off by {off:.3g}"
            )
    _same(
        "requires_grad",
        sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        sorted(reference.trainable_names()),
    )
    frozen = reference.frozen_norms() if not reference.contexts or reference.disabled else set(reference.norms)
    skipped = set(reference.norms) if reference.contexts and not reference.disabled else set()
    wrong = [
        name
        for name, module in model.named_modules()
        if name not in skipped
        and ".lora_" not in name
        and module.training != (reference.training and name not in frozen)
    ]
    if wrong:
        raise DivergenceError("modes", f"{wrong} are not in the mode asked for (training={reference.training})")
    if not reference.adapters:
        classes = ("Lora", "Frozen") if reference.stored else ("Lora", "Frozen", "Stored")
        left = [name for name, module in model.named_modules() if type(module).__name__.startswith(classes)]
        left += [name for name, module in model.named_modules() if any("_lora" in key for key in vars(module))]
        left += [key for key in ("_forward_pre_hooks", "_load_state_dict_pre_hooks") if getattr(model, key)]
        _same("left over after unloading", left, [])


def see(found: Mapping[str, Tensor], reference: Reference) -> None:
    """Takes over the bits of values that were only known up to rounding, at their first time in place."""
    for name, adapter in reference.owners().items():
        owner = reference.adapters[adapter]
        if name in owner.unseen and name not in reference.merged_weights:
            allowed = tolerance(found[name].dtype) + owner.unseen.pop(name)
            near("value in place", name, found[name], owner.values[name].double(), allowed)
            owner.values[name] = found[name].clone()


def check_outputs(model: Zoo, reference: Reference, inputs: tuple[Tensor, Tensor]) -> None:
    """Compares outputs in eval mode, without gradients."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(*inputs)
    except StateError as error:
        if not may_refuse_rows(reference):
            raise DivergenceError("eval forward refused", str(error)) from error
        return
    except Exception as error:
        raise DivergenceError("eval forward raised", f"{type(error).__name__}: {error}") from error
    finally:
        model.train(mode)
    compare_outputs("output in eval mode", outputs, reference.run(*inputs, training=False), reference.dtype)


SEVERAL = ("attention", "bilinear", "cross", "read", "recurrent")
"""Blocks with a module that takes or gives several tensors, or is not called: no other values for other rows."""


def may_refuse_rows(reference: Reference) -> bool:
    """Whether a row's adapter adapts a weight that is read past the layer, or has its own values in such a module."""
    rows = set(reference.contexts[-1] or ()) if reference.contexts else set()
    adapters = [reference.adapters[name] for name in rows if name is not None]
    past = any(reference.sites[slot.site].read for adapter in adapters for slot in adapter.slots)
    return past or any(name.startswith(SEVERAL) for adapter in adapters for name in adapter.values)


def check_training(model: Zoo, reference: Reference, inputs: tuple[Tensor, Tensor]) -> None:
    """Compares outputs and gradients in the mode that the model is in; or that a forward is refused."""
    mixed = bool(reference.contexts) and not reference.disabled
    if mixed or (reference.merged and reference.training):
        if not reference.training:
            return
        try:
            model(*inputs)
        except StateError:
            return
        except Exception as error:
            raise DivergenceError("training forward raised", f"{type(error).__name__}: {error}") from error
        raise DivergenceError("training forward", f"not refused ({'mixed' if mixed else 'merged'})")
    for attempt in range(3):
        x = inputs[0].clone().requires_grad_()
        outputs, loss = forward(model, (x, inputs[1]))
        result = reference.run(*inputs, training=reference.training)
        take_buffers(model, reference, result)
        try:
            compare_outputs("output with gradients", outputs, result, reference.dtype, drops(reference))
            parameters = trained(model) | {"input": x}
            try:
                values = gradients(loss, list(parameters.values()))
            except Exception as error:
                raise DivergenceError("backward raised", f"{type(error).__name__}: {error}") from error
            found = dict(zip(parameters, values, strict=True))
            expected = expected_gradients(result, tuple(parameters))
            compare_gradients(found, expected, tolerance(reference.dtype, result.size), drops(reference))
        except DivergenceError:
            # An element may really have been dropped; not twice in the same place.
            if not drops(reference) or attempt == 2:
                raise
        else:
            return


def drops(reference: Reference) -> bool:
    """Whether dropout acts."""
    acting = () if reference.disabled else reference.active
    return reference.training and any(reference.adapters[name].spec.dropout for name in acting)


def trained(model: Zoo) -> dict[str, Tensor]:
    """Returns the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def forward(model: Zoo, inputs: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Returns outputs and a loss with a fixed gradient of each output.

    Raises:
        DivergenceError: If the forward raises.
    """
    try:
        outputs = model(*inputs)
    except Exception as error:
        raise DivergenceError("forward raised", f"{type(error).__name__}: {error}") from error
    return outputs, loss_of(outputs)


def loss_of(outputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the sum of all outputs with fixed weights."""
    total = 0.0
    for output in outputs.values():
        weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64) * 1.7 + 0.3).view(output.shape)
        total = total + (output.double() * weights).sum()
    return total


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradients of a loss, None for what it does not depend on."""
    if not loss.requires_grad or not leaves:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def expected_gradients(result: Result, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the reference's gradients of these names."""
    leaves = [result.leaves[name] for name in names if name in result.leaves]
    known = [name for name in names if name in result.leaves]
    found = gradients(loss_of(result.outputs), leaves)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in zip(known, leaves, strict=True)}
    return zeros | {name: value for name, value in zip(known, found, strict=True) if value is not None}


def take_buffers(model: Zoo, reference: Reference, result: Result) -> None:
    """Compares running statistics after a forward in training mode, and takes over their bits."""
    if not reference.moves():
        return
    found = model.state_dict()
    for name, value in result.buffers.items():
        if found[name].is_floating_point() and not drops(reference):
            near("running statistics", name, found[name], value, tolerance(found[name].dtype, result.size))
        elif not found[name].is_floating_point() and not torch.equal(found[name], value):
            raise DivergenceError("running statistics", f"{name} is {found[name]}, expected {value}")
        reference.set_value(reference.first[name], found[name].clone())


def compare_outputs(
    what: str, outputs: Mapping[str, Tensor], result: Result, dtype: torch.dtype, dropped: bool = False
) -> None:
    """Compares the outputs of all blocks.

    Raises:
        DivergenceError: If one is off, or of another type.
    """
    for block, output in outputs.items():
        if output.dtype != dtype:
            raise DivergenceError("type of the output", f"{block} gives {output.dtype}, expected {dtype}")
        near(what, block, output, result.outputs[block], max(tolerance(dtype, result.size), DROPPED if dropped else 0))


def compare_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], allowed: float, dropped: bool = False
) -> None:
    """Compares gradients by name; None counts as zero.

    Args:
        found: What came.
        expected: What the reference says.
        allowed: The tolerance of an output. A gradient sums over the batch: a few roundings more.
        dropped: Whether dropout acted.

    Raises:
        DivergenceError: If one is off or missing.
    """
    for name, value in found.items():
        if name not in expected:
            if value is not None:
                raise DivergenceError("gradient", f"{name} has one, but the reference's output does not depend on it")
            continue
        if value is None:
            if bool(expected[name].any()):
                raise DivergenceError(
                    "gradient missing", f"{name} has none, expected {float(expected[name].abs().max()):.3g}"
                )
            continue
        near("gradient", name, value, expected[name], 4 * max(allowed, DROPPED if dropped else 0))


def near(what: str, name: str, found: Tensor, expected: Tensor, share: float) -> None:
    """Compares a tensor with one in float64.

    Raises:
        DivergenceError: If an element is off by more than a share of the largest one, or of 1 if that is smaller.
    """
    if found.shape != expected.shape:
        raise DivergenceError(what, f"{name} has the shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    found, expected = found.detach().double(), expected.detach().double()
    off = float((found - expected).abs().max()) if found.numel() else 0.0
    allowed = share * (1 + float(expected.abs().max()))
    if not off <= allowed:
        raise DivergenceError(what, f"{name} is off by {off:.3g}, where {allowed:.1g} is rounding")


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        if isinstance(found, list) and isinstance(expected, list):
            surplus, missing = [x for x in found if x not in expected], [x for x in expected if x not in found]
            raise DivergenceError(what, f"surplus {surplus}, missing {missing}")
        raise DivergenceError(what, f"{found}, expected {expected}")
