"""The data module that all data modules over image files inherit from: find, check, split and transform images."""

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_plugins import ConfigError
from lora_plugins.errors import counted, listing
from lora_plugins.field_checks import (
    Check,
    check_fields,
    check_flag,
    check_name,
    check_whole,
    choice_of,
    number_from,
    optional,
)
from lora_plugins.integrations.lightning.console import followed
from lora_plugins.tasks.argument_checks import check_size
from lora_plugins.tasks.data.samples import Item, LazySamples
from lora_plugins.tasks.data.seen_samples import Seen, warn_of_darkness, warn_of_repeats
from lora_plugins.tasks.data.transforms import Size, image_transform
from lora_plugins.tasks.data.vision_module import VisionDataModule
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import TEST, TRAIN, VAL, check_shares, hold_out, read_all, read_image

ERROR, SKIP = "error", "skip"
PROBLEM_POLICIES = (ERROR, SKIP)
_CHECKS: Mapping[str, Check] = {
    "image_size": optional(check_size),
    "interpolation": optional(check_name),
    "augmentation": check_name,
    "val_share": number_from(0, below=1),
    "test_share": number_from(0, below=1),
    "split_seed": check_whole,
    "check_files": check_flag,
    "on_problem": choice_of(*PROBLEM_POLICIES),
}
"""What the arguments can be, by name; the others are checked by whoever takes them."""


class ImageDataModule(VisionDataModule):
    """A data module over images and their labels or masks.

    Args:
        image_size: Height and width to which all images (and masks) are resized; by default what the trained model
            says.
        interpolation: How images are resized: `bilinear`, `bicubic`, `nearest`; by default what the model says.
        augmentation: How training images are augmented, a name in `lora_plugins.tasks.data.AUGMENTATIONS`.
        val_share: Share of the train split that becomes the val split, if the data has none.
        test_share: Likewise for the test split.
        split_seed: Selects one of the many possible splits.
        check_files: Whether every image is read once before training, to list all that cannot be used.
        on_problem: What happens to samples that cannot be used: `error` stops with a list of them, `skip` leaves them
            out with a warning that lists them.
        batch_size: Samples per batch.
        num_workers: Worker processes that load images; 0 loads in the training process.
        sampler: `shuffle`, or `balanced` to draw each class equally often (classification).
    """

    has_masks = False
    resized_to: Size | None = None
    """Height and width of the images, once they are known, for `read`: larger ones need not be decoded whole."""

    def __init__(
        self,
        *,
        image_size: Size | None = None,
        interpolation: str | None = None,
        augmentation: str = "flip",
        val_share: float = 0.0,
        test_share: float = 0.0,
        split_seed: int = 0,
        check_files: bool = True,
        on_problem: str = ERROR,
        batch_size: int = 32,
        num_workers: int = 0,
        sampler: str = "shuffle",
    ) -> None:
        super().__init__(batch_size, num_workers, sampler)
        given = {"image_size": image_size, "interpolation": interpolation, "augmentation": augmentation}
        splits = {"val_share": val_share, "test_share": test_share, "split_seed": split_seed}
        check_fields({**given, **splits, "check_files": check_files, "on_problem": on_problem}, _CHECKS)
        check_shares(val_share, test_share)
        self.image_size, self.interpolation, self.augmentation = image_size, interpolation, augmentation
        self.shares, self.split_seed = {VAL: val_share, TEST: test_share}, split_seed
        self.check_files, self.on_problem = check_files, on_problem
        self._transform((8, 8), augmentation)  # an unknown name is an error now, not after an hour of checking files

    @abstractmethod
    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The samples by split, and a list of problems with the samples that were left out."""

    def read(self, item: Item) -> tuple[Image.Image, Any]:
        """Reads a sample: its image, by default a file, and its class index or mask (H, W), by default its target.

        Raises:
            DataError: If it cannot be used.
        """
        return read_image(item.image, self.resized_to), item.target

    def targets(self, split: str) -> Iterator[Tensor]:
        """The targets of a split, sample by sample, flattened; masks are read as they are on disk."""
        for item in cast(LazySamples, self.splits[split]).items:
            known = isinstance(item.target, int)
            yield torch.as_tensor(item.target if known else self.read(item)[1]).reshape(-1)

    def stratum(self, item: Item) -> Hashable:
        """The stratum of a sample when splits are made: its class, for samples with one class each."""
        return item.target if isinstance(item.target, int) else 0

    def setup(self, stage: str) -> None:
        """Loads the splits, once; their images become what the model says that is trained or measured now."""
        self.resized_to = self._known_size()
        super().setup(stage)
        for split, samples in self.splits.items():
            if isinstance(samples, LazySamples):  # a subclass may load others
                samples.transform = self._transform_of(split)

    def load(self) -> dict[str, Dataset[Any]]:
        """Finds the samples, checks them, and splits them.

        Raises:
            DataError: With a list of what cannot be used, or if nothing is left, or fewer than two classes to train on.
        """
        items, problems = self.find()
        seen: dict[int, Seen] = {}
        if self.check_files:
            items, unreadable, seen = self._readable(items)
            problems = [*problems, *unreadable]
        if problems:
            self._report(problems)
        items = hold_out(items, self.shares, seed=self.split_seed, name=lambda item: item.key, stratum=self.stratum)
        for split in (TRAIN, VAL):
            if not items.get(split):
                raise DataError(f"There is nothing in the {split} split. {self._what_fills(split)}")
        warn_of_repeats(items, seen, self.class_names)
        if seen:
            warn_of_darkness(seen.values())
            self._check_classes(frozenset().union(*(seen[id(item)].classes for item in items[TRAIN])))
        return {split: LazySamples(members, self.read, self._transform_of(split)) for split, members in items.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for another process, as of workers that are not forked: reading needs no trainer."""
        return {**self.__dict__, "trainer": None}

    def _what_fills(self, split: str) -> str:
        share = self.shares.get(split)
        if not share:
            return f"Add samples, or set `{VAL}_share`."
        return f"A share of {share:g} of each class is rounded to none: add samples, or raise `{split}_share`."

    def size(self) -> Size:
        """Height and width of the images.

        Raises:
            ConfigError: If neither the arguments nor the model say.
        """
        if (size := self._known_size()) is None:
            raise ConfigError(f"Set `image_size` of {type(self).__name__}: the model does not say what it should be.")
        return size

    def plain_transform(self) -> Any:
        """The transform without augmentation, for all splits but train."""
        return self._transform(self.size(), "none")

    def _transform_of(self, split: str) -> Any:
        return self._transform(self.size(), self.augmentation) if split == TRAIN else self.plain_transform()

    def _transform(self, size: Size, augmentation: str) -> Any:
        return image_transform(
            size,
            augmentation,
            interpolation=self.interpolation or self._of_model("interpolation") or "bilinear",
            masks=self.has_masks,
            ignore_index=self.ignore_index,
        )

    def _known_size(self) -> Size | None:
        size = self.image_size or self._of_model("image_size")
        return None if size is None else (int(size[0]), int(size[1]))

    def _of_model(self, attribute: str) -> Any:
        """An attribute of the module that is trained; None if there is no trainer, or the module does not have it."""
        return None if self.trainer is None else getattr(self.trainer.lightning_module, attribute, None)

    def _readable(self, items: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], list[str], dict[int, Seen]]:
        """What can be read, what is wrong with the rest, and what is remembered of each sample, by its `id`."""
        flat = [item for members in items.values() for item in members]
        found = [*followed(read_all(flat, self._looked_at), "Reading files", len(flat))]
        wrong = [str(each) for each in found if isinstance(each, DataError)]
        seen = {id(item): each for item, each in zip(flat, found, strict=True) if not isinstance(each, DataError)}
        return {split: [i for i in members if id(i) in seen] for split, members in items.items()}, wrong, seen

    def _looked_at(self, item: Item) -> Seen:
        image, target = self.read(item)
        return Seen.of(image, target, self.ignore_index)

    def _check_classes(self, occurring: frozenset[int]) -> None:
        missing = [name for index, name in enumerate(self.class_names) if index not in occurring]
        if len(self.class_names) - len(missing) < 2:
            raise DataError(
                f"Of the classes {', '.join(self.class_names)}, {len(occurring) or 'none'} occurs in the train split, "
                f"and there is nothing to tell apart. {self.explain_missing()}"
            )
        if missing:
            rank_zero_warn(
                f"The train split holds nothing of {listing(missing)}, which therefore cannot be learned. "
                f"{self.explain_missing()}"
            )

    def explain_missing(self) -> str:
        """Why classes may be missing from the train split: advice for whoever made the data."""
        return "Add samples of other classes."

    def _report(self, problems: Sequence[str]) -> None:
        count = counted(len(problems), "problem")
        if self.on_problem == ERROR:
            raise DataError(
                f"The data cannot be used ({count}):\n{listed(problems)}\nWith on_problem: skip of the data (of a "
                "configuration, as `train` writes by --plan --save-config FILE: fit --config FILE "
                "--data.init_args.on_problem skip), such samples are left out."
            )
        rank_zero_warn(f"Samples are left out ({count}):\n{listed(problems)}")
