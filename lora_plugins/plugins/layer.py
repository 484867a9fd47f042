"""What a layer plugin says: which class it adapts, and how a low-rank matrix is laid out like its weight."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BranchUse = Literal["never", "dropout", "always"]


@dataclass(frozen=True)
class Slot:
    """One place of a layer that receives a low-rank update.

    Args:
        tensor: Attribute name of the weight, such as `weight` or `in_proj_weight`.
        part: Name of the part of that weight, such as `q`; empty where the whole weight is one slot.
        rows: The rows of the weight's matrix view that the update covers, as the first one, one past the last one,
            and the number of rows that the matrix has; all rows when None.
    """

    tensor: str
    part: str = ""
    rows: tuple[int, int, int] | None = None

    @property
    def suffix(self) -> str:
        """What follows `lora_A` and `lora_B` in the names of this slot's tensors."""
        return f"_{self.part}" if self.part else ""

    def cut(self, matrix: Tensor) -> Tensor:
        """Returns the rows that the update covers of the weight's matrix view; a view."""
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    def place(self, rows: Tensor) -> Tensor:
        """Returns a matrix of all rows of the weight with these at the slot's, zero elsewhere; the inverse of `cut`."""
        if self.rows is None:
            return rows
        start, stop, total = self.rows
        return F.pad(rows, (0, 0, start, total - stop))


@dataclass(frozen=True)
class Term:
    """One active update of a layer, ready for a branch: `scaling * B @ A @ dropout(x)`.

    Args:
        slot: Where the update belongs.
        A: `(r, in)`.
        B: `(out, r)`, where out counts the rows of the slot.
        scaling: The factor of the update.
        dropout: Probability of dropping an element of the branch's input, 0 outside of training.
        low_memory: Whether the input is computed again in the backward where it can be.
        delta: `(out, in)`, what a variant adds to the slot's rows in place of `scaling * B @ A`; None for plain LoRA.
    """

    slot: Slot
    A: Tensor
    B: Tensor
    scaling: float
    dropout: float
    low_memory: bool = False
    delta: Tensor | None = None

    def drop(self, x: Tensor) -> Tensor:
        """Drops elements of the branch's input, any shape, as `torch.nn.functional.dropout` does."""
        return F.dropout(x, self.dropout) if self.dropout else x

    def matrix(self) -> Tensor:
        """Returns the scaled update as a matrix `(out, in)` of the whole weight, zero outside of the slot's rows."""
        return self.slot.place((self.B * self.scaling) @ self.A if self.delta is None else self.delta)


def total(terms: Sequence[Term]) -> Tensor:
    """Returns the sum of the matrices of some terms, at least one."""
    return sum((term.matrix() for term in terms[1:]), terms[0].matrix())


def joined(terms: Sequence[Term]) -> Term | None:
    """Returns one term that does what several do; None if a variant says what one does, or several have dropout."""
    if any(term.delta is not None for term in terms):
        return None
    if len(terms) == 1 and terms[0].slot.rows is None:
        return terms[0]
    if len(terms) > 1 and any(term.dropout for term in terms):
        return None
    A = torch.cat([term.A for term in terms])
    B = torch.cat([term.slot.place(term.B * term.scaling) for term in terms], 1)
    low_memory = all(term.low_memory for term in terms)
    return Term(Slot(terms[0].slot.tensor), A, B, 1.0, terms[0].dropout, low_memory)


@dataclass(frozen=True)
class Updates:
    """The updates of a batch whose rows have different adapters.

    Args:
        A: `(updates, r, in)`, smaller ranks filled up with zeros.
        B: `(updates, out, r)`, scaled; the last update is zero.
        index: `(batch,)`, the update of each row.
    """

    A: Tensor
    B: Tensor
    index: Tensor

    @classmethod
    def stack(cls, terms: Sequence[Term], index: Tensor) -> "Updates":
        """Stacks one term for each update, and a zero behind them."""
        r = max(len(term.A) for term in terms)
        A = [F.pad(term.A, (0, 0, 0, r - len(term.A))) for term in terms]
        B = [F.pad(term.B * term.scaling, (0, r - len(term.A))) for term in terms]
        return cls(
            torch.stack([*A, torch.zeros_like(A[0])]),
            torch.stack([*B, torch.zeros_like(B[0])]),
            index,
        )


def add_update(base: Tensor, delta: Tensor) -> Tensor:
    """Returns `base + delta` in the type of the base, computed in the wider of both types and rounded once."""
    wide = torch.promote_types(base.dtype, delta.dtype)
    return (base.to(wide) + delta.to(wide)).to(base.dtype)


class LayerPlugin(ABC):
    """What a type of layer is, to LoRA.

    A plugin is stateless. It sees the weight of a layer as a matrix `(out, in)`; A is `(r, in)`, B is `(out, r)`, and
    the update `scaling * B @ A` is laid out like the weight by `from_matrix`. That alone makes a layer type work:
    the adapted layer then runs its own `forward` with the updated weight. A `branch` is an optional faster way to
    the same result, and the only way to honor dropout.

    Attributes:
        name: Unique name of the layer type, as plans and files show it.
        module_type: The module class, or its import path as a string (`"package.module.Class"`), which is compared
            without importing the package. Subclasses are adapted too; the most specific plugin wins.
        lookup: True for layers that look rows of the weight up by index. There A starts at zero instead of B, and
            dropout is refused, as indices cannot be dropped.
        branch_types: The classes, or their import paths, whose `forward` is known to be what `branch` computes.
            Subclasses are not included, as they may transform their weight or their input.
        branch_use: When `branch` replaces the layer's own forward for `branch_types`: `always`, or only while
            `dropout` acts, or `never`.
    """

    name: ClassVar[str]
    module_type: ClassVar[type[nn.Module] | str]
    lookup: ClassVar[bool] = False
    branch_types: ClassVar[Sequence[type[nn.Module] | str]] = ()
    branch_use: ClassVar[BranchUse] = "never"

    @abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """Views a weight as a matrix `(out, in)`: a reshape or a permutation, never a computation."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Lays a matrix `(out, in)` out as a weight of the given shape: the inverse of `to_matrix`."""

    def slots(self, layer: nn.Module) -> Sequence[Slot]:
        """Returns where a whole-layer adapter goes."""
        return (Slot("weight"),)

    def parts(self, layer: nn.Module) -> Mapping[str, Slot]:
        """Returns the slots of `q`, `k` and `v` where one layer computes all three; empty where it does not."""
        return {}

    def biases(self, layer: nn.Module) -> Sequence[str]:
        """Returns the attribute names of the biases that `bias="lora_only"` trains."""
        return ("bias",)

    def inputs(self, layer: nn.Module, slot: Slot, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the vectors that the matrix of a slot is multiplied by, `(n, in)`, for inits that learn from them.

        Optional: without it, such an init refuses the layer. A subclass is taken to feed its weight as its base class
        does.

        Args:
            layer: The layer; read its options, not its weight.
            slot: One of the layer's slots.
            *args: What the layer's `forward` was called with.
            **kwargs: Likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its weight is multiplied by.")

    def branch(
        self,
        layer: nn.Module,
        base: Mapping[str, Tensor | None],
        terms: Sequence[Term],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Computes the layer's output with its update, without forming the updated weight.

        Args:
            layer: The layer; read its options, not its weight.
            base: The untouched weights by slot tensor name.
            terms: The active updates, at least one.
            *args: What the layer's `forward` was called with.
            **kwargs: Likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} says branch_use={self.branch_use!r} but has no branch.")

    def mixed(
        self,
        layer: nn.Module,
        base: Mapping[str, Tensor | None],
        updates: Updates,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Computes the layer's output where each row of the batch has an update of its own; inference only.

        Optional: without it, `LoraModel.mixed_batch` refuses the layer.

        Args:
            layer: The layer; read its options, not its weight.
            base: The untouched weights by slot tensor name.
            updates: The updates of the rows.
            *args: What the layer's `forward` was called with; the batch is the first dimension of the first one.
            **kwargs: Likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot mix adapters in one batch.")


class RowMajorPlugin(LayerPlugin):
    """A layer whose weight has its outputs first: `(out, ...)`."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Flattens `(out, ...)` to `(out, in)`."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Reshapes `(out, in)` to `(out, ...)`."""
        return matrix.reshape(shape)


class ColumnMajorPlugin(LayerPlugin):
    """A layer whose weight has its inputs first: `(in, ...)`."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Flattens `(in, ...)` to `(in, out)` and transposes it."""
        return weight.flatten(1).T

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Transposes `(out, in)` and reshapes it to `(in, ...)`."""
        return matrix.T.reshape(shape)
