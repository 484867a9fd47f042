"""Pictures of a subject's class, which the base model draws once: training on them keeps what it can draw.

Prior preservation, section 3.2 of Dreambooth (Ruiz et al., 2022, arXiv 2208.12242).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_plugins.errors import counted
from lora_plugins.field_checks import check_count, check_flag, whole_from
from lora_plugins.integrations.diffusers import Sampling, sample
from lora_plugins.tasks.argument_checks import check_path, check_texts, instance_of
from lora_plugins.tasks.diffusion.captions import CAPTION_SUFFIX, Captioned, captioned_folder
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import as_png, image_files
from lora_plugins.utils import replace_files

NAME = "class-"
"""What the names of drawn pictures begin with."""


@dataclass(frozen=True)
class ClassPictures:
    """Which pictures of the class there are.

    Args:
        folder: Where they are kept, each with its prompt in a `.txt` beside it.
        prompts: The prompts that they are drawn for, in turn: that of the class, or several of what shall be kept.
        count: How many there have to be.
        generate: Whether the base model draws those that are missing.
        sampling: How it draws them.
        seed: The seed of the first one; each next one has the next seed.

    Raises:
        ConfigError: If there are no prompts, one is empty, or the count is none.
    """

    folder: str
    prompts: list[str]
    count: int = 100
    generate: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 1_000_000

    def __post_init__(self) -> None:
        check_path("folder", self.folder)
        check_texts("prompts", self.prompts)
        check_count("count", self.count)
        check_flag("generate", self.generate)
        instance_of(Sampling)("sampling", self.sampling)
        whole_from(0)("seed", self.seed)

    def present(self) -> list[Path]:
        """The pictures that are there."""
        return image_files(Path(self.folder)) if Path(self.folder).is_dir() else []

    def check(self) -> None:
        """Checks that there are enough pictures, or that the others can be drawn.

        Raises:
            DataError: If there are too few, or some were drawn for other prompts.
        """
        drawn = [path for path in self.present() if path.stem.startswith(NAME)]
        prompts = {caption.read_text(encoding="utf-8") for path in drawn if (caption := _caption(path)).is_file()}
        if prompts - {*self.prompts}:
            raise DataError(
                f"{Path(self.folder).absolute()} has pictures that were drawn for other prompts "
                f"({', '.join(sorted(prompts - {*self.prompts})[:3])}). Remove the folder, or name another one."
            )
        there = len(self.present())
        if there < self.count and not self.generate:
            raise DataError(
                f"{Path(self.folder).absolute()} has {counted(there, 'picture')} of the class, and {self.count} are "
                "asked for. Set `generate: true`, add pictures, or lower `count`."
            )

    def draw_missing(self, pipe: Any) -> int:
        """Lets a pipeline draw the pictures that are missing.

        Returns:
            How many were drawn.
        """
        folder = Path(self.folder)
        names = [f"{NAME}{number:05d}" for number in range(self.count)]
        there = {path.stem for path in self.present()}
        wanted = [number for number, name in enumerate(names) if name not in there][: max(0, self.count - len(there))]
        folder.mkdir(parents=True, exist_ok=True)
        for some in _chunks(wanted, self.sampling.batch_size):
            prompts = [self.prompts[number % len(self.prompts)] for number in some]
            pictures = sample(pipe, prompts, [self.seed + number for number in some], self.sampling)
            for number, prompt, picture in zip(some, prompts, pictures, strict=True):
                # The caption first: a run that is stopped in between leaves no picture without one, and no part of one.
                path = folder / f"{names[number]}.png"
                replace_files({_caption(path): prompt.encode(), path: as_png(picture)})
        return len(wanted)

    def read(self) -> list[Captioned]:
        """The pictures, with their prompts.

        Raises:
            DataError: If there are too few, or one cannot be read.
        """
        found = captioned_folder(Path(self.folder), None)
        if len(found) < self.count:
            raise DataError(
                f"{self.folder} has {counted(len(found), 'picture')} of the class, and {self.count} are asked for."
            )
        return found[: self.count]


def _caption(path: Path) -> Path:
    return path.with_suffix(CAPTION_SUFFIX)


def _chunks(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
