"""Images with one mask each: `images/{train,val}/NAME.jpg` and `masks/{train,val}/NAME.png`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_plugins.field_checks import Check, check_fields
from lora_plugins.tasks.argument_checks import check_path
from lora_plugins.tasks.data import Item
from lora_plugins.tasks.files import TEST, TRAIN, VAL, check_folder, paired
from lora_plugins.tasks.segmentation.mask_module import MaskDataModule

_CHECKS: Mapping[str, Check] = dict.fromkeys(("root", "images", "masks"), check_path)
"""What the arguments can be, by name; the others are checked by whoever takes them."""


class MaskFolderDataModule(MaskDataModule):
    """Images and masks on disk, paired by name: `root/images/train/a.jpg` with `root/masks/train/a.png`.

    The splits are `train` and `val`, and `test` if there is such a folder. If there is no `root/images/train`, the
    files are in `root/images` and `root/masks`, and `val_share` says how many become the val split.

    Args:
        root: The folder that holds `images` and `masks`.
        images: Name of the folder of images.
        masks: Name of the folder of masks.
        **options: The arguments of `MaskDataModule`.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(self, root: str, *, images: str = "images", masks: str = "masks", **options: Any) -> None:
        super().__init__(**options)
        check_fields({"root": root, "images": images, "masks": masks}, _CHECKS)
        self.root, self.images, self.masks = Path(root), images, masks

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The pairs of all splits, and the files without a partner."""
        check_folder(self.root)
        folder = self.root / self.images
        splits: Sequence[str] = [TRAIN]
        if not self._flat():
            splits = [TRAIN, *([VAL] if self.shares[VAL] == 0 or (folder / VAL).is_dir() else [])]
            splits += [TEST] if (folder / TEST).is_dir() else []
        problems: list[str] = []
        return {split: self._pairs(split, problems) for split in splits}, problems

    def _flat(self) -> bool:
        return self.shares[VAL] > 0 and not (self.root / self.images / TRAIN).is_dir()

    def _pairs(self, split: str, problems: list[str]) -> list[Item]:
        split_folder = "" if self._flat() else split
        image_folder, mask_folder = (self.root / kind / split_folder for kind in (self.images, self.masks))
        pairs = paired(image_folder, mask_folder, problems)
        return [Item(image, mask, str(mask), mask.stem) for image, mask in pairs]
