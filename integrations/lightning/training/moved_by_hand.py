"""Copies of adapted networks that a module changes by hand: they follow their origin, or the run stops at once.

What is written into a tensor outside of an optimizer is seen by the tensor's version, by its memory, or by its values.
Only what happens within a batch counts: between batches, validation exchanges whole models.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from lora_plugins.integrations.lightning.module import NetworkCopy, ids_in_place, is_adapted_alike
from lora_plugins.integrations.lightning.training.alike_copies import AlikeCopy
from lora_plugins.integrations.lightning.training.explained_errors import explain_plain_network
from lora_plugins.integrations.lightning.training.unlike_copies import UnlikeCopy

_OF_PAIRS: Mapping[type[Exception], str] = {
    RuntimeError: "size|shape|same number|key",
    KeyError: "lora_",  # a table of one network lacks no other names of the other one
    ValueError: "",
    IndexError: "",
}
"""By class, a pattern of the errors that come of pairs which do not belong together; an empty one fits all."""


class MovedByHand:
    """Watches the copies of adapted networks in a module from one batch to the next."""

    def __init__(self, module: nn.Module, copies: Sequence[NetworkCopy]) -> None:
        in_place = ids_in_place(module)
        self._unlike = [UnlikeCopy(module, copy, in_place) for copy in copies if not is_adapted_alike(module, copy)]
        self._alike = [AlikeCopy(module, copy, in_place) for copy in copies if is_adapted_alike(module, copy)]

    @property
    def _all(self) -> list[UnlikeCopy | AlikeCopy]:
        return [*self._unlike, *self._alike]

    def before_batch(self) -> None:
        """Checks what has changed since the last batch, and records the present state."""
        self.check()
        for each in self._all:
            each.note()

    def check(self) -> None:
        """Checks what has changed since `before_batch`.

        Raises:
            StateError: If a copy is moved that does not follow the adapter of its origin.
        """
        self._unlike = [each for each in self._unlike if not each.is_thawed]
        for each in self._all:
            each.check()

    def settle(self) -> None:
        """Takes rounding out of copies that hooks after ours have moved, ahead of whatever reads the module."""
        for each in self._alike:
            each.settle()

    def forget(self) -> None:
        """Ignores changes from now on until the next batch."""
        for each in self._all:
            each.forget()

    def finish(self) -> None:
        """Checks the values of what must not have changed.

        Raises:
            StateError: If it has.
        """
        self.settle()
        for each in self._unlike:
            each.compare()

    def explain(self, error: BaseException) -> None:
        """Adds a note to an error that pairs which do not belong together may have caused."""
        of_pairs = any(isinstance(error, kind) and re.search(found, str(error)) for kind, found in _OF_PAIRS.items())
        if self._unlike and of_pairs:
            error.add_note(f"It may come of this: {self._unlike[0].message('If the module moves it by hand')}")
        else:
            explain_plain_network(error)
