"""Images in one folder per class: `{train,val}/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` to be split."""

from pathlib import Path
from typing import Any

from lora_plugins.errors import no_folder
from lora_plugins.tasks.argument_checks import check_path
from lora_plugins.tasks.data import ImageDataModule, Item
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import TEST, TRAIN, VAL, image_files, subfolders, without_images


class ImageFolderDataModule(ImageDataModule):
    """Images on disk, sorted into folders by class: `root/train/CLASS/...`, `root/val/CLASS/...`, perhaps `root/test`.

    If there is no `root/train`, the folders of `root` are the classes, and `val_share` says how many images become
    the val split. The classes are the folders in alphabetical order.

    Args:
        root: The folder that holds `train` and `val`, or the classes.
        **options: The arguments of `ImageDataModule`.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(**options)
        check_path("root", root)
        self.root = Path(root)
        self._classes: list[str] = []

    @property
    def class_names(self) -> list[str]:
        """The names of the folders in the train split."""
        self._classes = self._classes or subfolders(self._folder(TRAIN))
        return self._classes

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The images of all splits, and the folders that are empty or not in the train split."""
        splits = [TRAIN]
        if self._folder(TRAIN) != self.root:
            splits += [VAL] if self.shares[VAL] == 0 or (self.root / VAL).is_dir() else []
            splits += [TEST] if (self.root / TEST).is_dir() else []
        problems: list[str] = []
        return {split: self._items(split, problems) for split in splits}, problems

    def _folder(self, split: str) -> Path:
        if (self.root / TRAIN).is_dir():
            return self.root / split
        if self.root.is_dir() and self.shares[VAL] == 0:
            raise DataError(
                f"{no_folder(self.root / TRAIN)} If the folders of the classes are in {self.root} itself, set "
                "`val_share`, such as 0.2, to hold a part of them out."
            )
        return self.root

    def _items(self, split: str, problems: list[str]) -> list[Item]:
        folder = self._folder(split)
        items: list[Item] = []
        targets = {name: at for at, name in enumerate(self.class_names)}
        for name in subfolders(folder):
            paths = image_files(folder / name)
            if not paths:
                problems.append(without_images(folder / name))
            if name not in targets:
                problems.append(f"{folder / name} is no class of {self._folder(TRAIN)}")
                continue
            items += [Item(path, targets[name], str(path), path.relative_to(folder).as_posix()) for path in paths]
        return items
