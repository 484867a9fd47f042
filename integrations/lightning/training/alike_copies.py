"""Copies that are adapted as their origin is: an average of their parameters is one of their adapters as well."""

from collections.abc import Set
from dataclasses import replace

import torch
from torch import nn

from lora_plugins import StateError
from lora_plugins.adapter import adapter_tensors
from lora_plugins.inplace import submodule
from lora_plugins.integrations.lightning.module import (
    NetworkCopy,
    base_pairs,
    checksum,
    checksums,
    copy_factors,
    derives_from_base,
    local,
)
from lora_plugins.integrations.lightning.training.written_tensors import FIRST_CHECKS, WrittenTensors

_FOLLOWS = 3
"""Batches in which a copy is moved, by the last of which its adapter has to have moved too."""

_ROUNDING = 16
"""Units in the last place by which an average of equal values may differ from them."""


class AlikeCopy:
    """A copy that is adapted as its origin is: its adapter follows, and averages of equal values stay exact.

    Equal values are those of the frozen base of an equal copy and of its origin, and of what a copy shares with its
    origin. Of the latter a copy is kept, since it is averaged with itself.

    `in_place` are the parameters that adapters train in place, by `id`.
    """

    def __init__(self, module: nn.Module, copy: NetworkCopy, in_place: Set[int]) -> None:
        self._module, self._copy = module, copy
        pairs = [(own, origin) for _, own, origin in base_pairs(module, copy, in_place)]
        # Tensors that consist of others, as those of torchao do, have no arithmetic: nothing averages them.
        averaged = [(own, origin) for own, origin in pairs if not hasattr(own, "__tensor_flatten__")]
        self._base = [(own, origin) for own, origin in averaged if copy.equal and own is not origin]
        self._start = [] if copy.is_directed else self._sums_of_origin()
        self._base += [(own, local(own).clone()) for own, origin in averaged if own is origin]
        self._own, self._origin = (adapter_tensors(submodule(module, p)) for p in (copy.name, copy.origin))
        self._factors = WrittenTensors(self._own.values())
        self._sums = checksums(self._own)
        self._moved, self._looks, self._drifts = 0, 0, False
        self._follows = not self._own
        # Resumed, or fitted again, it has an adapter of its own already.
        self._is_new = not any(bool(tensor.any()) for name, tensor in self._own.items() if ".lora_B" in f".{name}")
        self._watched = WrittenTensors(own for own, _ in pairs)
        self._watched_origin = WrittenTensors(origin for _, origin in pairs)

    def note(self) -> None:
        """Records the present state, ahead of a batch."""
        for each in (self._watched, self._watched_origin, self._factors):
            each.note()

    def forget(self) -> None:
        """Ignores changes until the next `note`."""
        self._watched.forget()
        self._watched_origin.forget()

    def check(self) -> None:
        """Checks what has changed since `note`: that the adapter follows, and takes rounding out of the base.

        Raises:
            StateError: If the copy is moved, and its adapter does not follow that of its origin.
        """
        self._looks += 1
        if not self._copy.is_directed and not self._moved and self._origin_is_moved():
            self._turn()
        written = self._watched.written()
        # Once all is well it is taken for moved: to look at values is to wait for the device.
        drifts = self._drifts and (self._follows or self._differs())
        moves = written or drifts or (self._looks <= FIRST_CHECKS and self._differs())
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
        return self._looks <= FIRST_CHECKS and self._sums_of_origin() != self._start

    def _sums_of_origin(self) -> list[int]:
        return [checksum(origin) for _, origin in self._base]

    def _turn(self) -> None:
        self._copy = replace(self._copy, origin=self._copy.name, name=self._copy.origin)
        self._base = [(origin, own) for own, origin in self._base]
        self._own, self._origin = self._origin, self._own
        self._watched, self._watched_origin = self._watched_origin, self._watched
        self._factors, self._sums = WrittenTensors(self._own.values()), checksums(self._own)

    def _start_alike(self) -> None:
        """Gives the copy the A of its origin: with one A, an average of B is one of the product."""
        for adapter in {name.rpartition(".")[2] for name in self._own}:
            if not derives_from_base(self._module, adapter):
                copy_factors(self._module, self._copy, adapter, but="lora_B")
        self._sums = checksums(self._own)

    def _differs(self) -> bool:
        return any(not torch.equal(local(own), local(origin)) for own, origin in self._base)

    def _settle(self) -> None:
        """Removes rounding errors from a base that averages equal values; larger differences are the module's own.

        It is done in each step, so it reads no value, for which it would wait for the device.
        """
        with torch.no_grad():
            for own, origin in self._base:
                if not (own.is_floating_point() or own.is_complex()) or not own.numel():
                    continue
                limit = _ROUNDING * torch.finfo(own.dtype).eps * origin.abs().max()
                own.copy_(torch.where((own - origin).abs().max() <= limit, origin, own))

    def _stop(self) -> None:
        name, origin = self._copy.name, self._copy.origin
        raise StateError(
            f"{name!r} is a copy of {origin!r} that the module moves by hand, and its adapter does not follow: the "
            "module pairs parameters that it took before there were adapters, or those of some names alone ('weight'), "
            "so the copy would never learn. Let it ask for parameters() when it moves the copy, whatever their names, "
            "or make the pairs in on_fit_start."
        )
