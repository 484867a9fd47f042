"""Dropout masks that are drawn again from a seed instead of being stored.

Drawing is most of the cost of dropout on a CPU, so one number of 64 bits serves eight elements: each takes a byte, and
is dropped if the byte is below `256 p`, rounded. The share that is dropped is therefore a multiple of 1/256; where that
is more than two per cent off (a small p), each element takes two bytes and the share is a multiple of 1/65536. Outputs
are scaled by the share that really survives, so their mean is exact.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lora_plugins.kernels._channels import channels_last
from lora_plugins.kernels._operation import operation

_ROUNDING = 0.02
_FULL_RANGE = -(2**63)
SEEDS = 2**62
"""How many seeds there are."""

_WITHOUT_WORDS = frozenset({"mps"})
"""Kinds of devices whose generators draw 32 bits at most, and refuse the whole range of 64: GPUs of Apple."""

_CHUNK_ELEMENTS = 2**20
"""Elements of a mask in memory at a time, on a CPU."""

_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Types of which a CPU multiplies the bits with a mask of integers in a third of the time, as nothing is rounded.

What is dropped is 0 then, also where it is infinite.
"""

Part = slice | None
"""Some images of a batch; None for all of them."""


@operation
def random_words(count: int, generator: torch.Generator) -> Tensor:
    """Returns `count` random numbers of 64 bits, which depend on the state of the generator only."""
    if generator.device.type in _WITHOUT_WORDS:
        single = torch.empty(8 * count, dtype=torch.uint8, device=generator.device)
        return single.random_(0, 2**8, generator=generator).view(torch.int64)
    words = torch.empty(count, dtype=torch.int64, device=generator.device)
    return words.random_(_FULL_RANGE, None, generator=generator)


def part_of(images: Tensor, part: Part) -> Tensor:
    """Returns some images; a view."""
    return images if part is None else images[part]


def without_gaps(x: Tensor) -> Tensor:
    """Returns a tensor that is dense in memory, without overlaps or gaps, so that masks have a defined order."""
    if x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride():
        return x
    return x.clone()


@dataclass(frozen=True)
class Dropout:
    """One draw of masks, the same each time it is played.

    Args:
        seed: Where the masks come from.
        threshold: An element is dropped if its random number is below this one.
        bits: Of the random number of an element, 8 or 16.
        words: Makes the random numbers.
    """

    seed: int
    threshold: int
    bits: int
    words: Callable[[int, torch.Generator], Tensor] = field(compare=False)

    @classmethod
    def draw(cls, p: float) -> "Dropout":
        """Takes a seed from torch's global generator, whose state gradient checkpointing and resuming restore."""
        return cls.of(p, int(torch.randint(SEEDS, (), device="cpu")))

    @classmethod
    def of(cls, p: float, seed: int) -> "Dropout":
        """Returns the masks of a seed below `SEEDS`, for a probability of dropping an element."""
        bits = 8 if abs(round(256 * p) / 256 - p) <= _ROUNDING * p else 16
        threshold = max(1, min(round(2**bits * p), 2**bits - 1))
        return cls(seed, threshold, bits, random_words.pinned())

    @property
    def scale(self) -> float:
        """What surviving elements are multiplied by, so that the mean stays."""
        survivors = 1 - self.threshold / float(2**self.bits)
        return 1 / survivors

    def mask_like(self, x: Tensor) -> Tensor:
        """Returns the mask of a tensor, 1 where an element survives and 0 where not, of its type and memory format."""
        return self._mask(x, x.dtype, self._numbers(x))

    def parts(self, x: Tensor, dtype: torch.dtype) -> Iterator[tuple[Part, Tensor]]:
        """Yields parts of the batch with their mask; each mask reuses the memory of the one before.

        Args:
            x: The tensor, `(images, channels, ...)`. On a GPU, or where images do not follow each other in memory, all
                are one part.
            dtype: Of the masks.
        """
        numbers, each = self._numbers(x), x.numel() // max(len(x), 1)
        count = -(-len(x) // max(_CHUNK_ELEMENTS // max(each, 1), 1))
        if count <= 1 or not x.is_cpu or not (x.is_contiguous() or channels_last(x)):
            yield None, self._mask(x, dtype, numbers)
            return
        size = -(-len(x) // count)  # of equal parts, so that threads share them evenly
        mask = torch.empty_like(x[:size], dtype=dtype, requires_grad=False)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            yield part, self._fill(mask[: len(x) - start], numbers[start * each :])

    def _numbers(self, x: Tensor) -> Tensor:
        words = self.words(-(-x.numel() * self.bits // 64), torch.Generator(x.device).manual_seed(self.seed))
        return words.view(torch.uint8 if self.bits == 8 else torch.int16)

    def _mask(self, x: Tensor, dtype: torch.dtype, numbers: Tensor) -> Tensor:
        return self._fill(torch.empty_like(x, dtype=dtype, requires_grad=False), numbers)

    def _fill(self, mask: Tensor, numbers: Tensor) -> Tensor:
        threshold = self.threshold + torch.iinfo(numbers.dtype).min  # numbers of 16 bits have a sign, bytes have none
        torch.ge(numbers[: mask.numel()], threshold, out=mask.as_strided((mask.numel(),), (1,)))
        return mask


def dropped_parts(
    x: Tensor, dtype: torch.dtype, dropout: Dropout | None, *, masks: bool
) -> Iterator[tuple[Part, Tensor, Tensor | None]]:
    """Yields parts of the batch, the images in them cast and with dropout applied, and their mask for `add_dropped`.

    In parts, temporary tensors stay in the caches, and the C library does not give their memory back to the system.
    What is yielded is written over for the next part.

    Args:
        x: The images.
        dtype: Of what is yielded.
        dropout: The masks.
        masks: Whether they are wanted; otherwise their memory is used for what is left of the images.
    """
    if dropout is None:
        yield None, x.to(dtype), None
        return
    spare = None
    for part, mask in dropout.parts(x, _INTEGERS.get(dtype, dtype) if x.is_cpu else dtype):
        some = part_of(x, part)
        if mask.dtype != dtype:
            some = some.to(dtype).view(mask.dtype)
        if masks:
            spare = torch.empty_like(mask) if spare is None else spare
            yield part, torch.mul(mask, some, out=spare[: len(mask)]).view(dtype), mask
        else:
            yield part, mask.mul_(some).view(dtype), None


def add_dropped(target: Tensor, gradient: Tensor, mask: Tensor) -> None:
    """Adds what a mask of `dropped_parts` leaves of a gradient, which may be written over."""
    if mask.is_floating_point():
        target.addcmul_(gradient, mask)
    else:
        gradient.view(mask.dtype).mul_(mask)
        target.add_(gradient)


def sum_of_parts(gradients: Sequence[Tensor | None]) -> Tensor:
    """Returns the sum of what came from parts of a batch."""
    return functools.reduce(torch.add, cast(Sequence[Tensor], gradients))
