"""What a branch is handed: the active updates of a layer, or the updates of the rows of a mixed batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.config import LayerSettings
from lora_plugins.plugins.slot import Slot
from lora_plugins.utils import common_type, laid_out_like


@dataclass(frozen=True)
class Rescaling:
    """What a variant does that rescales the rows of the updated weight.

    Args:
        own: The variant's own tensors.
        factors: Returns what the rows are multiplied by, from `W + scaling * B @ A`, detached, and the own tensors.
    """

    own: Sequence[Tensor]
    factors: Callable[..., Tensor]


@dataclass(frozen=True)
class Term:
    """One active update of a layer, ready for a branch: `scaling * B @ A @ dropout(x)`.

    Args:
        slot: Where the update belongs.
        A: `(r, in)`.
        B: `(out, r)`, where out counts the rows of the slot.
        settings: The numbers that the plan has for the layer.
        training: Whether dropout acts.
        delta: `(out, in)`, what a variant adds to the slot's rows in place of `scaling * B @ A`; None for plain LoRA.
        rescaling: What a variant does to `W + scaling * B @ A`, in place of a `delta`; only where the branch of the
            plugin takes it.
    """

    slot: Slot
    A: Tensor
    B: Tensor
    settings: LayerSettings
    training: bool = False
    delta: Tensor | None = None
    rescaling: Rescaling | None = None

    @property
    def scaling(self) -> float:
        """The factor of `B @ A`."""
        return self.settings.scaling

    @property
    def dropout(self) -> float:
        """The probability of dropping an element of the branch's input; 0 outside of training."""
        return self.settings.dropout if self.training else 0.0

    @property
    def low_memory(self) -> bool:
        """Whether the input is computed again in the backward where it can be."""
        return self.settings.low_memory

    def drop(self, x: Tensor) -> Tensor:
        """Drops elements of the branch's input, any shape, as `torch.nn.functional.dropout` does."""
        return F.dropout(x, self.dropout) if self.dropout else x

    def delta_weight(self) -> Tensor:
        """Returns the scaled update as a matrix `(out, in)` of the whole weight, zero outside of the slot's rows."""
        return self.slot.place((self.B * self.scaling) @ self.A if self.delta is None else self.delta)


def sum_of_deltas(terms: Sequence[Term]) -> Tensor:
    """Returns the sum of the updates of some terms, at least one, as a matrix of the whole weight."""
    return sum((term.delta_weight() for term in terms[1:]), terms[0].delta_weight())


def joined(terms: Sequence[Term]) -> Term | None:
    """Returns one term that does what several do; None if a variant says what one does, or several have dropout."""
    if any(term.delta is not None or term.rescaling is not None for term in terms):
        return None
    if len(terms) == 1 and terms[0].slot.rows is None:
        return terms[0]
    if len(terms) > 1 and any(term.dropout for term in terms):
        return None
    A = torch.cat([term.A for term in terms])
    B = torch.cat([term.slot.place(term.B * term.scaling) for term in terms], 1)
    low_memory = all(term.low_memory for term in terms)
    settings = replace(terms[0].settings, scaling=1.0, low_memory=low_memory)
    return Term(Slot(terms[0].slot.tensor), A, B, settings, terms[0].training)


@dataclass(frozen=True)
class StackedAdapters:
    """The adapters of a batch whose rows have different ones.

    Args:
        A: `(adapters, r, in)`, smaller ranks filled up with zeros.
        B: `(adapters, out, r)`, scaled; the last one is zero, for rows of the base.
        index: `(batch,)`, the adapter of each row.
        factors: `(adapters, out)`, what variants multiply the rows of `W + B A` by, one where an adapter has none; None
            if there is no such variant.
    """

    A: Tensor
    B: Tensor
    index: Tensor
    factors: Tensor | None = None

    @classmethod
    def stack(cls, terms: Sequence[Term], index: Tensor, weight: Callable[[], Tensor]) -> "StackedAdapters":
        """Stacks one term for each adapter, and a zero behind them.

        Args:
            terms: The updates.
            index: The adapter of each row of the batch.
            weight: Returns `W`, `(out, in)`; called for variants only.
        """
        r = max(len(term.A) for term in terms)
        A = [F.pad(term.A, (0, 0, 0, r - len(term.A))) for term in terms]
        B = [F.pad(term.B * term.scaling, (0, r - len(term.A))) for term in terms]
        return cls(
            torch.stack([*A, torch.zeros_like(A[0])]),
            torch.stack([*B, torch.zeros_like(B[0])]),
            index,
            _factors(terms, weight) if any(term.rescaling for term in terms) else None,
        )

    def rescale(self, y: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        """Multiplies the outputs of each row of a batch by its adapter's factors, and adds a bias, which has none.

        Args:
            y: `(batch, ..., out, ...)`, without the bias where there are factors.
            bias: `(out,)` or None.
            axis: Of the outputs.
        """
        if self.factors is None:
            return y
        shape = [1] * y.ndim
        shape[axis] = y.shape[axis]
        rescaled = y * self.factors[self.index].view(len(y), *shape[1:])
        return (rescaled if bias is None else rescaled + bias.view(shape).to(rescaled.dtype)).to(y.dtype)


def _factors(terms: Sequence[Term], weight: Callable[[], Tensor]) -> Tensor:
    """Returns what the rows of the updated weight are multiplied by, for each term and for none."""
    W, found = weight(), []
    for term in terms:
        if (how := term.rescaling) is None:
            found.append(term.A.new_ones(len(W)))
        else:
            direction = torch.addmm(W.to(term.A.dtype), term.B, term.A, alpha=term.scaling)
            found.append(how.factors(direction.detach(), *how.own))
    return torch.stack([*found, torch.ones_like(found[0])])


def add_updates(y: Tensor, updates: Sequence[Tensor]) -> Tensor:
    """Returns the sum of a layer's own output and updates of it, in type and layout of the output.

    Updates are to be computed before the layer's own output. Then the gradient of the layer's own input is the first to
    arrive in the backward, and its layout is that of the sum: torch's normalizations (2.13, on a CPU) are silently
    wrong for some others.
    """
    for update in updates:
        y = laid_out_like(y, y + update.to(y.dtype))
    return y


def add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """Returns `base + delta` in type and layout of the base, computed in the wider of both types and rounded once."""
    wide = common_type(base.dtype, delta.dtype)
    # Of another layout where a dimension is 1, torch's transposed convolutions make wrong outputs.
    return laid_out_like(base, (base.to(wide) + delta.to(wide)).to(base.dtype))
