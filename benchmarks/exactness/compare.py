"""Comparison of outputs and of models."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest difference of two lists of tensors, as a share of the largest element of each tensor.

    Infinite where the lists differ in length, shape or in what is not finite (masked scores are -inf).
    """
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    return max((_relative(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)), default=0.0)


def _relative(found: Tensor, expected: Tensor) -> float:
    finite = torch.isfinite(expected)
    if not torch.equal(torch.where(finite, 0, expected), torch.where(torch.isfinite(found), 0, found)):
        return float("inf")
    expected, difference = torch.where(finite, expected, 0), torch.where(finite, found - expected, 0)
    if not difference.numel() or not difference.any():
        return 0.0
    return float(difference.abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Snapshot:
    """All that has to be the same again after unloading, with the hook counts of every module."""

    state: dict[str, Tensor]
    modules: list[tuple[str, type]]
    modes: list[tuple[object, ...]]
    requires_grad: list[tuple[str, bool]]


def snapshot(model: nn.Module) -> Snapshot:
    """Takes note of a model."""
    named = list(model.named_modules(remove_duplicate=False))
    return Snapshot(
        state={
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in model.state_dict().items()
        },
        modules=[(name, type(module)) for name, module in named],
        modes=[(n, m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in named],
        requires_grad=[(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
    )


def difference(before: Snapshot, after: Snapshot) -> str:
    """Says how two models differ in the bits of their state dicts or in their classes; empty if they do not."""
    keys = sorted(before.state.keys() ^ after.state.keys())
    if keys:
        return f"state dict keys differ: {', '.join(keys[:3])}"
    changed = [key for key, value in before.state.items() if not _same_bits(value, after.state[key])]
    if changed:
        return f"{len(changed)} tensors differ: {', '.join(changed[:3])}"
    return _first_change(before.modules, after.modules)


def residue(before: Snapshot, after: Snapshot) -> str:
    """Says how two models differ otherwise: order of keys, modes, hooks, `requires_grad`; empty if they do not."""
    if list(before.state) != list(after.state):
        return "the state dict has another order"
    return _first_change(before.modes, after.modes) or _first_change(before.requires_grad, after.requires_grad)


def _first_change(before: Sequence[object], after: Sequence[object]) -> str:
    if len(before) != len(after):
        return f"{len(before)} entries became {len(after)}"
    return next((f"{old} became {new}" for old, new in zip(before, after, strict=True) if old != new), "")


def _same_bits(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (tensor.flatten().contiguous().view(torch.uint8) for tensor in (a, b))
    return torch.equal(one, other)
