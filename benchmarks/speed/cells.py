"""The cells of the table: a model in one precision, eager or compiled, with a dropout and with checkpointing or not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from benchmarks.speed.cases import CASES, Case

MODES = ("eager", "compiled")


@dataclass(frozen=True)
class Cell:
    """One cell of the table: a key of `CASES`, one of `PRECISIONS`, one of `MODES`, and options."""

    case: str
    precision: str
    mode: str
    dropout: float
    checkpointing: bool
    device: str

    @property
    def key(self) -> str:
        """Identifies the cell in a file."""
        checkpointing = "checkpointing" if self.checkpointing else "no checkpointing"
        return ", ".join(
            [self.device, self.case, self.precision, self.mode, f"dropout {self.dropout:g}", checkpointing]
        )

    @property
    def model(self) -> Case:
        """The model, and how it is adapted."""
        return replace(CASES[self.case], checkpointing=self.checkpointing)


def cells(options: Any) -> Iterator[Cell]:
    """Yields the cells that the options of the command select."""
    chosen = product(options.case, options.precision, options.mode, options.dropout, options.checkpointing)
    for case, precision, mode, dropout, checkpointing in chosen:
        if checkpointing == "no" or CASES[case].can_checkpoint:
            yield Cell(case, precision, mode, dropout, checkpointing == "yes", torch.device(options.device).type)
