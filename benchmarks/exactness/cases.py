"""A case: how one model is built and run, the same way each time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20


@dataclass(frozen=True)
class Case:
    """One model of the sweep: how it is built with random weights, and run on inputs that are made anew."""

    suite: str
    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]


def fresh(case: Case) -> nn.Module:
    """Builds the model of a case in float64 and eval mode; the same bits at every call.

    The default type is set to float64 for the whole process, since many models make constants of the default type in
    their forward.
    """
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(SEED)
    model = case.build().double().eval()
    _wake(model)
    return model


def outputs(case: Case, model: nn.Module) -> list[Tensor]:
    """Runs the model of a case; returns every floating tensor of what it returns, in order."""
    torch.manual_seed(SEED + 1)
    return list(floating_tensors(case.run(model)))


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Yields the floating tensors in nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    children: Sequence[Any] = ()
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, list | tuple):
        children = value
    elif is_dataclass(value) and not isinstance(value, type):
        children = [getattr(value, field.name) for field in fields(value)]
    for child in children:
        yield from floating_tensors(child)


def loss(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a scalar that depends on every finite element: squares with random weights, so that nothing cancels.

    Each tensor is divided by its own mean square first (as a constant), so that large ones do not drown small ones.
    """
    generator = torch.Generator().manual_seed(SEED + 2)
    total = torch.zeros(())
    for tensor in tensors:
        finite = torch.where(torch.isfinite(tensor), tensor, 0)
        weights = torch.rand(finite.shape, generator=generator) + 0.5
        scale = finite.detach().square().mean().clamp(min=1e-30)
        if finite.numel():
            total = total + (weights * finite.square()).sum() / scale
    return total


def strengthen(model: nn.Module) -> None:
    """Scales small weights up: started at 0.02, layers as narrow as these let the signal fade to nothing.

    Some models start the gains of their normalization at 0.02 too, in place of 1.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.fill_(1.0)
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.any():
                least = 1.0 / parameter[0].numel() ** 0.5
                parameter.mul_((least / parameter.square().mean().sqrt()).clamp(min=1))


def _wake(model: nn.Module) -> None:
    """Adds noise to parameters that are constant: zeroed gains and heads would hide whole branches from the checks.

    The noise is positive, which keeps most rectifiers open.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter).abs(), alpha=0.1)
