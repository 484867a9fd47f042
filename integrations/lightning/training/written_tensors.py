"""Whether tensors were written to outside of an optimizer, by their versions and their memory."""

from collections.abc import Iterable

from torch import Tensor

from lora_plugins.utils import version

FIRST_CHECKS = 6
"""Checks in which values are compared as well: what writes past autograd (`tensor.data`) changes no version."""


class WrittenTensors:
    """Tensors of which it is asked whether something has written to them since `note`."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._marks: list[tuple[int, int]] | None = None

    def note(self) -> None:
        """Records versions and memory."""
        self._marks = self._now()

    def forget(self) -> None:
        """Ignores what is written until the next `note`."""
        self._marks = None

    def written(self) -> bool:
        """Whether they were written to, or moved to other memory."""
        return self._marks is not None and self._marks != self._now()

    def written_in_place(self) -> bool:
        """Whether they were written to in their memory."""
        return self._marks is not None and [old for old, _ in self._marks] != [new for new, _ in self._now()]

    def _now(self) -> list[tuple[int, int]]:
        return [(version(tensor), tensor.data_ptr()) for tensor in self._tensors]
