"""Copies that are not adapted as their origin is: a module that changes one by hand pairs parameters wrongly."""

from collections.abc import Collection, Set

from torch import nn

from lora_plugins import StateError
from lora_plugins.adapter import adapted_layers
from lora_plugins.errors import listing
from lora_plugins.inplace import submodule
from lora_plugins.integrations.lightning.module import NetworkCopy, base_pairs, checksums
from lora_plugins.integrations.lightning.training.written_tensors import FIRST_CHECKS, WrittenTensors


class UnlikeCopy:
    """A copy that is not adapted as its origin is, and so must not be changed.

    `in_place` are the parameters that adapters train in place, by `id`.
    """

    def __init__(self, module: nn.Module, copy: NetworkCopy, in_place: Set[int]) -> None:
        self._module, self._copy = module, copy
        self._tensors = {name: tensor for name, tensor, _ in base_pairs(module, copy, in_place)}
        self._sums = checksums(self._tensors)
        self._looks = 0
        self._watched = WrittenTensors(self._tensors.values())

    @property
    def is_thawed(self) -> bool:
        """Whether it is trained by now, as a twin that BackboneFinetuning had frozen: it follows nothing."""
        return self._copy.frozen and any(tensor.requires_grad for tensor in self._tensors.values())

    def note(self) -> None:
        """Records the present state, ahead of a batch."""
        self._watched.note()

    def forget(self) -> None:
        """Ignores changes until the next `note`."""
        self._watched.forget()

    def check(self) -> None:
        """Checks that nothing has changed since `note`.

        Raises:
            StateError: If something has.
        """
        self._looks += 1
        if self._looks <= FIRST_CHECKS:
            self.compare()
        if self._watched.written_in_place():
            raise StateError(self.message("As the module moves it by hand"))
        if self._watched.written():  # or it was moved to another device and back
            self.compare()
            self.note()

    def compare(self) -> None:
        """Checks the values.

        Raises:
            StateError: If they have changed.
        """
        if checksums(self._tensors) != self._sums:
            raise StateError(self.message("As the module moves it by hand"))

    def message(self, moved: str) -> str:
        """Returns what is wrong, and what to do."""
        origin, name = self._copy.origin, self._copy.name
        layers, own = (set(adapted_layers(submodule(self._module, part))) for part in (origin, name))
        steps = [
            f"adapt {_named(name, layers - own)} as {_named(origin, layers)} are" if layers - own else "",
            f"leave {_named(name, own - layers)} out" if own - layers else "",
        ]
        advice = f"In target_modules and exclude_modules, {' and '.join(filter(None, steps))}"
        if layers == own:  # and the names of their adapters differ
            advice = "Adapt both by one LoraCallback"
        return (
            f"{name!r} is a copy of {origin!r}, which has adapters, and is not adapted alike. {moved}, its parameters "
            f"are paired with those of {origin!r}, and they are not the same. {advice}; a `target` has to have both "
            "parts in it. Adapters of a copy follow those of its original."
        )


def _named(part: str, layers: Collection[str]) -> str:
    return listing(sorted(f"{part}.{layer}".removesuffix(".") for layer in layers), 8)
