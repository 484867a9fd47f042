"""The files that a run leaves of its adapter, each in a format of its own."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_plugins import ConfigError, LoraModel, Plan
from lora_plugins.field_checks import shown
from lora_plugins.plugins import OWN_FORMAT
from lora_plugins.writable import (
    check_space,
    check_writable_file,
    check_writable_folder,
    check_writable_place,
    from_home,
)


@dataclass(frozen=True)
class AdapterFile:
    """One file or folder of an adapter.

    Args:
        path: Its path.
        format: Its format: `lora_plugins`, `peft`, `diffusers`, `kohya`, `comfyui`, or the name of an installed one.
        format_options: Options of that format.
    """

    path: str
    format: str = OWN_FORMAT
    format_options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is our own folder."""
        return self.format == OWN_FORMAT

    @property
    def title(self) -> str:
        """What messages and reports call it."""
        return "adapter" if self.is_ours else f"adapter for {self.format}"

    def write(self, target: nn.Module, adapter_name: str, path: Path | None = None) -> Path:
        """Writes the unmerged adapter of a model under the model's names; to another path if one is given.

        Raises:
            AdapterFileError: If the format cannot express it.
            PluginError: If there is no such format.
        """
        lora = LoraModel(target)
        return lora.save_adapter(
            path or Path(self.path), adapter_name, format=self.format, format_options=self.format_options
        )


def adapter_files(given: AdapterFile | str | Path | list[str | Path | AdapterFile] | None) -> tuple[AdapterFile, ...]:
    """Returns the files that an option names; a path alone is our own folder.

    Raises:
        ConfigError: If something else is given, options for our own folder, or a path twice.
    """
    several = [] if given is None else given
    entries = list(several) if isinstance(several, Sequence) and not isinstance(several, str) else [several]
    files = tuple(AdapterFile(str(entry)) if isinstance(entry, str | Path) else entry for entry in entries)
    for file in files:
        if not isinstance(file, AdapterFile) or not isinstance(file.path, str | Path):
            raise ConfigError(f"save_adapter_to holds {file!r}. An entry is a path, or an AdapterFile(path, format).")
        if file.is_ours and file.format_options:
            raise ConfigError(
                f"save_adapter_to: format_options of {file.path} are {shown(dict(file.format_options))}, and our own "
                "folder has none. Say which format they are of, as in format='peft', or leave them out."
            )
    placed = tuple(replace(file, path=from_home(file.path)) for file in files)
    check_distinct([file.path for file in placed])
    return placed


def titles(files: Sequence[AdapterFile]) -> list[str]:
    """Returns what messages and reports call each of some files; those of one format are numbered from the second on.

    There are several of one where each has other options, as the two transformers of Wan 2.2 in files of diffusers.
    """
    seen: Counter[str] = Counter()
    found = []
    for file in files:
        seen[file.title] += 1
        found.append(file.title if seen[file.title] == 1 else f"{file.title} {seen[file.title]}")
    return found


def check_distinct(paths: Iterable[str]) -> None:
    """Checks that no result of a run would overwrite another one.

    Raises:
        ConfigError: If one would.
    """
    places = Counter(os.path.abspath(path) for path in paths)
    twice = [place for place, count in places.items() if count > 1]
    if twice:
        raise ConfigError(f"Two results of a run would be written to {twice[0]}. Give each a path of its own.")


def check_expressible(files: Sequence[AdapterFile], target: nn.Module, adapter_name: str) -> None:
    """Writes the initial adapter in each format and discards it: what cannot be written is known before training.

    Raises:
        AdapterFileError: If a format cannot express it.
        PluginError: If there is no such format.
    """
    for file in files:
        if not file.is_ours:
            with tempfile.TemporaryDirectory() as folder:
                file.write(target, adapter_name, Path(folder) / Path(file.path).name)


def check_places(files: Sequence[AdapterFile], export_to: str | None) -> None:
    """Checks before training that files can be written to their places.

    Raises:
        ConfigError: If one cannot.
    """
    for file in files:
        check = check_writable_folder if file.is_ours else check_writable_place
        check(Path(file.path), "save_adapter_to")
    if export_to is not None:
        check_writable_file(Path(export_to), "export_to")


def check_room(files: Sequence[AdapterFile], export_to: str | None, plan: Plan) -> None:
    """Checks before training that there is room for the files.

    Raises:
        ConfigError: If there is not.
    """
    for file in files:
        check_space(Path(file.path), _BYTES * plan.trainable, "save_adapter_to")
    if export_to is not None:
        check_space(Path(export_to), _BYTES * plan.base_parameters, "export_to")


_BYTES = 4
"""Of a parameter in a file, in most models."""
