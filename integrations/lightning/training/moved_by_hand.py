"""Copies of adapted networks that a module changes by hand: they follow their origin, or the run stops at once.

What is written into a tensor outside of an optimizer is seen by the tensor's version, by its memory, or by its values.
Only what happens within a batch counts: between batches, validation exchanges whole models.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.adapter import adapted_layers, adapter_tensors
from lora_plugins.errors import listing
from lora_plugins.inplace import submodule
from lora_plugins.integrations.lightning.module import (
    NetworkCopy,
    base_pairs,
    checksums,
    copy_factors,
    is_adapted_alike,
    local,
)
from lora_plugins.utils import version

_FOLLOWS = 3
"""Batches in which a copy is moved, by the last of which its adapter has to have moved too."""

_OF_PAIRS = ("size", "shape", "same number", "key")
"""Words of the errors that torch raises for pairs which do not belong together."""

_ROUNDING = 16
"""Units in the last place by which an average of equal values may differ from them."""


class MovedByHand:
    """Watches the copies of a module from one batch to the next.

    Args:
        module: The module, adapted.
        copies: Its copies of adapted networks.
    """

    def __init__(self, module: nn.Module, copies: Sequence[NetworkCopy]) -> None:
        self._unlike = [_Unlike(module, copy) for copy in copies if not is_adapted_alike(module, copy)]
        alike = [_Alike(module, copy) for copy in copies if is_adapted_alike(module, copy)]
        self._all: list[_Unlike | _Alike] = [*self._unlike, *alike]
        self._alike = alike

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
        of_pairs = isinstance(error, KeyError | ValueError | IndexError) or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_PAIRS)
        )
        if self._unlike and of_pairs:
            error.add_note(f"It may come of this: {self._unlike[0].message('If the module moves it by hand')}")


class _Watched:
    """Tensors that are not to be written, or are expected to be."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._marks: list[tuple[int, int]] | None = None

    def note(self) -> None:
        self._marks = self._now()

    def forget(self) -> None:
        self._marks = None

    def written(self) -> bool:
        """Whether they were written to, or moved to other memory."""
        return self._marks is not None and self._marks != self._now()

    def written_in_place(self) -> bool:
        return self._marks is not None and [old for old, _ in self._marks] != [new for new, _ in self._now()]

    def _now(self) -> list[tuple[int, int]]:
        return [(version(tensor), tensor.data_ptr()) for tensor in self._tensors]


class _Unlike:
    """A copy that is not adapted as its origin is, and so must not be changed."""

    def __init__(self, module: nn.Module, copy: NetworkCopy) -> None:
        self._module, self._copy = module, copy
        self._tensors = {name: tensor for name, tensor, _ in base_pairs(module, copy)}
        self._sums = checksums(self._tensors)
        self._looks = 0
        self._watched = _Watched(self._tensors.values())

    def note(self) -> None:
        self._watched.note()

    def forget(self) -> None:
        self._watched.forget()

    def check(self) -> None:
        self._looks += 1
        if self._looks <= 2 * _FOLLOWS:
            self.compare()
        if self._watched.written_in_place():
            raise StateError(self.message("As the module moves it by hand"))
        if self._watched.written():  # or it was moved to another device and back
            self.compare()
            self.note()

    def compare(self) -> None:
        if checksums(self._tensors) != self._sums:
            raise StateError(self.message("As the module moves it by hand"))

    def message(self, moved: str) -> str:
        """Returns what is wrong, and what to do."""
        origin, name = self._copy.origin, self._copy.name
        layers, own = (set(adapted_layers(submodule(self._module, part))) for part in (origin, name))
        advice = [
            f"adapt {_named(name, layers - own)} as {_named(origin, layers)} are" if layers - own else "",
            f"leave {_named(name, own - layers)} out" if own - layers else "",
            "with the same rank" if layers == own else "",
        ]
        return (
            f"{name!r} is a copy of {origin!r}, which has adapters, and is not adapted alike. {moved}, its parameters "
            f"are paired with those of {origin!r}, and they are not the same. In target_modules and exclude_modules, "
            f"{' and '.join(filter(None, advice))}; a `target` has to have both parts in it. Adapters of a copy follow "
            "those of its original."
        )


def _sums_of(tensors: Iterable[Tensor]) -> dict[str, int]:
    return checksums({str(at): tensor for at, tensor in enumerate(tensors)})


def _named(part: str, layers: Collection[str]) -> str:
    return listing(sorted(f"{part}.{layer}" for layer in layers), 8)


class _Alike:
    """A copy that is adapted as its origin is: its adapter follows, and averages of equal values stay exact.

    These are the base of an equal copy, which is that of the origin, and what a copy shares with its origin: a copy of
    the latter's values is kept, since it is averaged with itself.
    """

    def __init__(self, module: nn.Module, copy: NetworkCopy) -> None:
        self._module, self._copy = module, copy
        pairs = [(own, origin) for _, own, origin in base_pairs(module, copy)]
        self._base = [(own, origin) for own, origin in pairs if copy.equal and own is not origin]
        self._start = {} if copy.is_directed else _sums_of(origin for _, origin in self._base)
        self._base += [(own, local(own).clone()) for own, origin in pairs if own is origin]
        self._own, self._origin = (adapter_tensors(submodule(module, p)) for p in (copy.name, copy.origin))
        self._factors = _Watched(self._own.values())
        self._sums = checksums(self._own)
        self._moved, self._looks, self._drifts = 0, 0, False
        self._follows = not self._own
        # Resumed, or fitted again, it has an adapter of its own already.
        self._is_new = not any(bool(tensor.any()) for name, tensor in self._own.items() if ".lora_B" in f".{name}")
        self._watched = _Watched(own for own, _ in pairs)
        self._watched_origin = _Watched(origin for _, origin in pairs)

    def note(self) -> None:
        for each in (self._watched, self._watched_origin, self._factors):
            each.note()

    def forget(self) -> None:
        self._watched.forget()
        self._watched_origin.forget()

    def check(self) -> None:
        self._looks += 1
        if not self._copy.is_directed and not self._moved and self._origin_is_moved():
            self._turn()
        written = self._watched.written()
        moves = written or ((self._drifts or self._looks <= 2 * _FOLLOWS) and self._differs())
        if moves:
            self._drifts = self._drifts or not written
            self._moved += 1
            self._settle()
        if self._moved and not self._follows:
            self._follows = self._factors.written() or checksums(self._own) != self._sums
            if not self._follows and self._moved >= _FOLLOWS and checksums(self._origin) != self._sums:
                self._stop()
        if moves and self._moved == 1 and self._is_new and not self._copy.equal:
            self._start_alike()
        self.note()

    def settle(self) -> None:
        """Checks once more; only looks of batches count."""
        looks = self._looks
        self.check()
        self._looks = looks

    def _origin_is_moved(self) -> bool:
        """Whether of two equal trainable parts it is the origin that follows the other."""
        own, origin = self._watched.written(), self._watched_origin.written()
        if own or origin:
            return origin and not own
        return self._looks <= 2 * _FOLLOWS and _sums_of(origin for _, origin in self._base) != self._start

    def _turn(self) -> None:
        self._copy = replace(self._copy, origin=self._copy.name, name=self._copy.origin)
        self._base = [(origin, own) for own, origin in self._base]
        self._own, self._origin = self._origin, self._own
        self._watched, self._watched_origin = self._watched_origin, self._watched
        self._factors, self._sums = _Watched(self._own.values()), checksums(self._own)

    def _start_alike(self) -> None:
        """Gives the copy the A of its origin: with one A, an average of B is one of the product."""
        for adapter in {name.rpartition(".")[2] for name in self._own}:
            copy_factors(self._module, self._copy, adapter, but="lora_B")
        self._sums = checksums(self._own)

    def _differs(self) -> bool:
        return any(not torch.equal(local(own), local(origin)) for own, origin in self._base)

    def _settle(self) -> None:
        """Removes rounding errors from a base that averages equal values; larger differences are the module's own."""
        with torch.no_grad():
            for own, origin in self._base:
                if not own.is_floating_point():
                    continue
                close = _ROUNDING * torch.finfo(own.dtype).eps * origin.abs().max()
                if (own - origin).abs().max() <= close:
                    own.copy_(origin)

    def _stop(self) -> None:
        name, origin = self._copy.name, self._copy.origin
        raise StateError(
            f"{name!r} is a copy of {origin!r} that the module moves by hand, and its adapter does not follow: the "
            "module pairs parameters that it took before there were adapters, so the copy would never learn. Let it "
            f"ask for parameters() when it moves the copy, or make the pairs in on_fit_start."
        )
