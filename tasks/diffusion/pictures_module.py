"""The data of text-to-image training: pictures with prompts, and pictures of the class beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lora_plugins import ConfigError
from lora_plugins.field_checks import check_count, check_fields, check_flag, optional, whole_from
from lora_plugins.tasks.argument_checks import check_path, instance_of
from lora_plugins.tasks.data import Size
from lora_plugins.tasks.diffusion.buckets import BucketBatchSampler, bucket_sizes, fit, nearest_bucket
from lora_plugins.tasks.diffusion.captions import Captioned, captioned_folder, captioned_list
from lora_plugins.tasks.diffusion.class_pictures import ClassPictures
from lora_plugins.tasks.files import read_image


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one size with their prompts; first those of the subject, then as many of the class, if any.

    Attributes:
        pixels: (N, 3, H, W), in [-1, 1].
        prompts: N prompts.
        names: N names, the same for the same pixels.
        sizes: (N, 6): height and width of the file, top and left of the cut, height and width of the cut.
        is_class: (N,), whether a picture is of the class; on the CPU.
    """

    pixels: Tensor
    prompts: list[str]
    names: list[str]
    sizes: Tensor
    is_class: Tensor

    def to(self, device: Any, **options: Any) -> "PictureBatch":
        """The same batch on another device; what Lightning calls. What a step asks the host for stays there."""
        pixels, sizes = (each.to(device, **options) for each in (self.pixels, self.sizes))
        return PictureBatch(pixels, self.prompts, self.names, sizes, self.is_class)


@dataclass(frozen=True)
class _Sample:
    pixels: Tensor
    prompt: str
    name: str
    sizes: tuple[int, ...]
    is_class: bool


class _Pictures(Dataset[list[_Sample]]):
    """Each picture, some times over; with one of the class, drawn at random, of the same size."""

    def __init__(
        self,
        pictures: Sequence[Captioned],
        sizes: Sequence[Size],
        others: Sequence[Captioned],
        repeats: int,
        flip: bool,
    ) -> None:
        self.pictures, self.sizes, self.others, self.repeats, self.flip = pictures, sizes, others, repeats, flip

    def __len__(self) -> int:
        return len(self.pictures) * self.repeats

    def __getitem__(self, index: int) -> list[_Sample]:
        number = index % len(self.pictures)
        samples = [self._read(self.pictures[number], self.sizes[number], False)]
        if self.others:
            other = self.others[int(torch.randint(len(self.others), ()))]
            samples.append(self._read(other, self.sizes[number], True))
        return samples

    def _read(self, picture: Captioned, size: Size, is_class: bool) -> _Sample:
        pixels, sizes = fit(read_image(picture.path), size)
        flipped = self.flip and bool(torch.rand(()) < 0.5)
        name = f"{picture.path}@{size[0]}x{size[1]}{'/flipped' if flipped else ''}"
        return _Sample(pixels.flip(-1) if flipped else pixels, picture.prompt, name, sizes, is_class)


def _collate(pairs: Sequence[Sequence[_Sample]]) -> PictureBatch:
    samples = sorted((sample for pair in pairs for sample in pair), key=lambda sample: sample.is_class)
    return PictureBatch(
        torch.stack([sample.pixels for sample in samples]),
        [sample.prompt for sample in samples],
        [sample.name for sample in samples],
        torch.tensor([sample.sizes for sample in samples]),
        torch.tensor([sample.is_class for sample in samples]),
    )


class PicturesDataModule(LightningDataModule):
    """Pictures with prompts, for a `TextToImageTask`.

    Prompts are one for all (`prompt`), in a `.txt` beside each picture (neither `prompt` nor `samples`), or in a list
    (`samples`). Every file is read before anything is trained.

    Args:
        root: The folder of the pictures.
        prompt: One prompt for all of them.
        samples: A list, `.csv` or `.jsonl`, with the columns `image`, relative to `root`, and `prompt`.
        resolution: The side of the pictures: they are scaled to cover the square, and cut to it in the middle.
        buckets: Whether pictures keep about their aspect ratio instead, in sizes of about the same area.
        bucket_step: What the sides of these sizes are multiples of.
        class_pictures: Pictures of the class for prior preservation; a batch has as many of them as of the subject.
        repeats: How often each picture comes in an epoch.
        random_flip: Whether pictures are mirrored at random.
        batch_size: Pictures of the subject per batch.
        num_workers: Worker processes that load data.

    Raises:
        ConfigError: If arguments do not go together.
    """

    def __init__(
        self,
        root: str,
        *,
        prompt: str | None = None,
        samples: str | None = None,
        resolution: int = 512,
        buckets: bool = False,
        bucket_step: int = 64,
        class_pictures: ClassPictures | None = None,
        repeats: int = 1,
        random_flip: bool = False,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_path("root", root)
        optional(instance_of(str))("prompt", prompt)
        optional(check_path)("samples", samples)
        optional(instance_of(ClassPictures))("class_pictures", class_pictures)
        if prompt is not None and samples is not None:
            raise ConfigError("There are `prompt`, one for all pictures, and `samples`, a list of prompts. Give one.")
        if prompt is not None and not prompt.strip():
            raise ConfigError("`prompt` is empty. Say what is to be learned, such as 'a photo of a sks dog'.")
        counts = {"repeats": repeats, "batch_size": batch_size, "resolution": resolution, "bucket_step": bucket_step}
        check_fields(counts, dict.fromkeys(counts, check_count))
        flags = {"buckets": buckets, "random_flip": random_flip}
        check_fields(flags, dict.fromkeys(flags, check_flag))
        whole_from(0)("num_workers", num_workers)
        self.root, self.prompt, self.samples = Path(root), prompt, samples
        self.resolution, self.buckets, self.bucket_step = resolution, buckets, bucket_step
        self.class_pictures, self.repeats, self.random_flip = class_pictures, repeats, random_flip
        self.batch_size, self.num_workers = batch_size, num_workers
        self.pictures: list[Captioned] = []

    def setup(self, stage: str) -> None:
        """Reads and checks all pictures.

        Raises:
            DataError: For one that cannot be read, a prompt that is missing or empty, or too few class pictures.
            ConfigError: For buckets on several processes, which would have batches of different numbers.
        """
        if self.class_pictures is not None:
            self.class_pictures.check()
        self.pictures = self._read()
        several = self.trainer is not None and self.trainer.world_size > 1
        if several and len(self.sizes) > 1:
            raise ConfigError(
                "Pictures are in several buckets, and each process would have another number of batches. Set "
                "`buckets: false`, or train in one process."
            )

    @property
    def sizes(self) -> set[Size]:
        """The sizes of the training pictures."""
        return set(self._sizes())

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of pictures, in random order."""
        others = [] if self.class_pictures is None else self.class_pictures.read()
        sizes = self._sizes()
        data = _Pictures(self.pictures, sizes, others, self.repeats, self.random_flip)
        return DataLoader(
            data,
            batch_sampler=BucketBatchSampler(RandomSampler(data), self.batch_size, False, sizes * self.repeats),
            collate_fn=_collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _read(self) -> list[Captioned]:
        if self.samples is not None:
            return captioned_list(Path(self.samples), self.root)
        return captioned_folder(self.root, self.prompt)

    def _sizes(self) -> list[Size]:
        if not self.buckets:
            return [(self.resolution, self.resolution)] * len(self.pictures)
        buckets = bucket_sizes(self.resolution, self.bucket_step)
        of_size = {size: nearest_bucket(size, buckets) for size in {picture.size for picture in self.pictures}}
        return [of_size[picture.size] for picture in self.pictures]
