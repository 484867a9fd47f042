"""The adapters of a folder: which there are, and those that are loaded, each on the one base that it is for."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_plugins import LoraModel
from lora_plugins.errors import ConfigError, LoraError, StateError
from lora_plugins.files import MANIFEST
from lora_plugins.plugins import PackedAdapter
from lora_plugins.tasks.command_lines import adapters_in
from lora_plugins.tasks.errors import unknown
from lora_plugins.tasks.serving.described import Described, describe_folder, read_described
from lora_plugins.tasks.training import VisionTask

PAUSES = (0.01, 0.1, 0.5)
"""Seconds before a folder that was there is looked for again: one that is replaced is not there for a moment."""


class UnknownAdapterError(ConfigError):
    """There is no adapter of that name."""


@dataclass(frozen=True)
class _Loaded:
    described: Described
    key: str
    """Name of the adapter on its base; folders have names that adapters may not have."""


class Shelf:
    """The adapters below a folder, and the bases of those that are loaded. One thread at a time loads and runs.

    Args:
        folder: Its subfolders are adapter folders of tasks, as a fit leaves them; some may come and go.
        limit: How many adapters are loaded at a time; the one that was not used for longest goes once another one is
            loaded.
        device: Where they compute.
        dtype: What they compute in.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        limit: int = 64,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self.limit = Path(folder), limit
        self._device, self._dtype = torch.device(device), dtype
        self._bases: dict[str, VisionTask] = {}
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._numbers = count()
        self._known: set[str] = set()

    def names(self) -> list[str]:
        """The names of all adapters that there are now."""
        found = adapters_in(self.folder)
        self._known.update(found)
        return found

    def loaded(self) -> list[str]:
        """The names of those that are loaded, the next one to go first."""
        return [*self._loaded]

    def bytes(self) -> int:
        """What the weights of all bases and loaded adapters take."""
        return sum(parameter.nbytes for task in self._bases.values() for parameter in task.parameters())

    def describe(self, name: str) -> Described:
        """What an adapter says about itself; read anew each time.

        Raises:
            UnknownAdapterError: If there is none of that name, with near ones. A path is no name.
            WeightsError: If its manifest cannot be read or does not say which task it is of.
        """
        for pause in PAUSES:
            with suppress(LoraError):
                return self._described(name)
            if name not in self._known or (self.folder / name / MANIFEST).exists():
                break
            time.sleep(pause)
        try:
            return self._described(name)
        except UnknownAdapterError:
            self._known.discard(name)
            raise

    def load(self, described: Described, needed: Sequence[Described] = ()) -> None:
        """Loads an adapter, if that version of it is not loaded; those that are needed do not go to make place for it.

        Raises:
            ReplacedError: If another version, or none, is there now; describe it again.
            LoraError: If it cannot be loaded. In both cases those that are loaded stay, and nothing else does.
        """
        name = described.name
        found = self._loaded.get(name)
        if found is not None and found.described == described:
            self._loaded.move_to_end(name)
            return
        task, key = self._with_adapter(described, read_described(self.folder, described))
        if found is not None:
            self._remove(name)
        self._bases[described.base] = task
        self._loaded[name] = _Loaded(described, key)
        self._make_room({name, *(each.name for each in needed)})

    @torch.inference_mode()
    def logits(self, rows: Sequence[Described], images: Tensor) -> Tensor:
        """The logits of images, each by its adapter: all at once, or where an adapter cannot be mixed, one by one.

        All of these are loaded, and on the same base; images are (N, channels, H, W) in [0, 1].
        """
        task, images = self._bases[rows[0].base], images.to(self._device, self._dtype)
        lora, keys = LoraModel(_target(task, rows[0])), [self._loaded[row.name].key for row in rows]
        try:
            with lora.mixed_batch(keys):
                mixed: Tensor = task(images)
            return mixed
        except StateError:  # of a type, a variant or an own value that cannot be mixed
            return self._one_by_one(lora, task, keys, images)

    def _one_by_one(self, lora: LoraModel, task: VisionTask, keys: Sequence[str], images: Tensor) -> Tensor:
        found: dict[int, Tensor] = {}
        for key in dict.fromkeys(keys):
            places = [at for at, each in enumerate(keys) if each == key]
            lora.set_adapter(key, trainable=False)
            found |= dict(zip(places, task(images[places]), strict=True))
        return torch.stack([found[at] for at in range(len(keys))])

    def _described(self, name: str) -> Described:
        if name not in self._known or not (self.folder / name / MANIFEST).exists():  # not listed anew each time
            names = self.names()
            if name not in names:
                raise UnknownAdapterError(str(unknown("adapter", name, names)))
        return describe_folder(self.folder / name)

    def _with_adapter(self, described: Described, packed: PackedAdapter) -> tuple[VisionTask, str]:
        """The base with the adapter, and its name there; a base that is already there is untouched by an error."""
        task = self._bases.get(described.base)
        if task is None:
            task = described.task.build()
        key = f"adapter{next(self._numbers)}"
        lora = LoraModel.load_packed(_target(task, described), packed, key)
        try:
            task.eval().to(self._device, self._dtype)  # only now: the adapter was made on the base in its own type
        except Exception:  # there was no memory left
            lora.delete_adapter(key)
            raise
        return task, key

    def _make_room(self, keep: set[str]) -> None:
        while len(self._loaded) > self.limit and (old := next((n for n in self._loaded if n not in keep), None)):
            self._remove(old)

    def _remove(self, name: str) -> None:
        gone = self._loaded.pop(name)
        LoraModel(_target(self._bases[gone.described.base], gone.described)).delete_adapter(gone.key)
        if all(each.described.base != gone.described.base for each in self._loaded.values()):
            del self._bases[gone.described.base]


def _target(task: VisionTask, described: Described) -> nn.Module:
    """The part of a task that an adapter is for."""
    return task.get_submodule(described.provenance.get("target") or "")
