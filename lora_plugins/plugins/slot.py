"""A slot: one place of a layer that receives a low-rank update."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Slot:
    """One place of a layer that receives a low-rank update.

    Args:
        tensor: Attribute name of the weight, such as `weight` or `in_proj_weight`.
        part: Name of the part, such as `q`, which its A and B have too: `lora_A_q`. Empty where a layer has one slot;
            of several slots, each has another one.
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
