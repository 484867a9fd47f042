"""Two halves of the train split, each validated by the other: for choosing settings without the val split."""

from collections.abc import Sequence
from pathlib import Path

PARTS = ("train", "val")


def write_halves(data: Path, folder: Path) -> list[Path]:
    """Writes two folders of links, laid out like DATA, that have the train split alone.

    Every second image (of its class, in the order of names) trains in one half and validates in the other, so that the
    mean over both is of every training image once.
    """
    halves = [folder / "first", folder / "second"]
    for half, (even, odd) in zip(halves, (PARTS, PARTS[::-1]), strict=True):
        for found in sorted((data / "cifar-mini" / "train").iterdir()):
            for part, paths in _dealt(found, even, odd).items():
                _link(paths, half / "cifar-mini" / part / found.name)
        for kind in ("images", "masks"):
            for part, paths in _dealt(data / "camvid-mini" / kind / "train", even, odd).items():
                _link(paths, half / "camvid-mini" / kind / part)
    return halves


def _dealt(folder: Path, even: str, odd: str) -> dict[str, list[Path]]:
    paths = sorted(folder.iterdir())
    return {even: paths[::2], odd: paths[1::2]}


def _link(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in paths:
        (folder / path.name).symlink_to(path.resolve())
