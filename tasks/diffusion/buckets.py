"""Sizes of training pictures: one for all, or buckets of aspect ratios of about the same area."""

from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler
from torchvision.transforms import v2

from lora_plugins.tasks.data import Size

Fitted = tuple[Tensor, tuple[int, ...]]


LONGEST = 2
"""The largest ratio of the sides of a bucket."""


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """The sizes of buckets: multiples of a step, of at most the area of a square, and as large as they can be."""
    sizes = {(resolution, resolution)}
    for width in range(step, resolution * LONGEST, step):
        height = resolution * resolution // width // step * step
        if height and max(width / height, height / width) <= LONGEST:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of a picture, and of these the largest."""
    ratio = size[1] / size[0]

    def distance(bucket: Size) -> tuple[float, int]:
        own = bucket[1] / bucket[0]
        return max(own / ratio, ratio / own), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def fit(picture: Image.Image, size: Size) -> Fitted:
    """A picture scaled to cover a size, and cut to it in the middle.

    Returns:
        The picture (3, H, W) in [-1, 1]; and its own height and width, the cut's top and left, and the height and width
        of the size, which Stable Diffusion XL is told (Podell et al., 2023, arXiv 2307.01952, section 2.2).
    """
    width, height = picture.size
    scale = max(size[0] / height, size[1] / width)
    covered = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if covered != (height, width):
        picture = picture.resize((covered[1], covered[0]), Image.Resampling.LANCZOS)
    top, left = (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2
    cut = picture.crop((left, top, left + size[1], top + size[0]))
    pixels = v2.functional.to_dtype(v2.functional.pil_to_tensor(cut), torch.float32, scale=True)
    return pixels * 2 - 1, (height, width, top, left, *size)


class BucketBatchSampler(BatchSampler):
    """Batches of samples of one bucket, in the order in which a sampler fills them; incomplete ones at the end.

    `buckets` has the bucket of each sample.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, buckets: Sequence[Any]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.buckets = buckets

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[Any, list[int]] = {}
        for index in self.sampler:
            batch = waiting.setdefault(self.buckets[index], [])
            batch.append(index)
            if len(batch) == self.batch_size:
                yield waiting.pop(self.buckets[index])
        if not self.drop_last:
            yield from waiting.values()

    def __len__(self) -> int:
        counts = list(Counter(self.buckets).values())
        if len(counts) == 1:  # of the one bucket, each process has a share
            counts = [len(cast(Sized, self.sampler))]
        return sum(count // self.batch_size if self.drop_last else -(-count // self.batch_size) for count in counts)
