"""The base class of formats that hold an A and a B for each layer name; what does not depend on the format is here."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lora_plugins.formats.from_packed import check_expressible, portable_of
from lora_plugins.formats.portable import PortableAdapter
from lora_plugins.formats.to_packed import packed_for
from lora_plugins.plugins import AdapterFormat, AdapterSummary, LayerSummary, PackedAdapter, Registry


class PortableFormat(AdapterFormat):
    """A format of layers with an A and a B: `class MyFormat(PortableFormat)` with `load` and `save`.

    Attributes:
        full_names: Whether a file has the full names of layers, so that it can be converted without a model.
    """

    full_names: ClassVar[bool] = True

    @abstractmethod
    def load(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Reads a file.

        Args:
            path: The file or folder.
            model: The model that it is read for, where names have to be found in one; None to say what is in it.
            options: All options of the format.

        Raises:
            AdapterFileError: If the file is damaged or says what cannot be expressed here, or a key is left over.
        """

    @abstractmethod
    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes a file, in place of the one that is there; returns its path.

        `replace_files` writes several files or, where the disk is full, none, so that none is read with one of before.

        Args:
            path: The file or folder; the folder that it is in is there.
            adapter: The adapter, which `refusals` found nothing against.
            model: The model that it is of; None where a file is converted without one.
            options: All options of the format.
        """

    def refusals(self, adapter: PortableAdapter) -> Sequence[str]:
        """Returns what the format cannot express, a sentence for each layer or value; empty if it can all."""
        return ()

    def read(
        self, path: Path, model: nn.Module, registry: Registry | None, options: Mapping[str, Any]
    ) -> PackedAdapter:
        """Reads an adapter for a model; see `AdapterFormat`."""
        return packed_for(model, self.load(path, model, options), registry)

    def write(
        self,
        path: Path,
        packed: PackedAdapter,
        model: nn.Module,
        registry: Registry | None,
        options: Mapping[str, Any],
    ) -> Path:
        """Writes an adapter of a model; see `AdapterFormat`."""
        return self.write_portable(path, portable_of(packed, model, registry), model, options)

    def write_portable(
        self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]
    ) -> Path:
        """Writes an adapter that the format can express, in a folder that need not be there.

        Args:
            path: The file or folder.
            adapter: The adapter.
            model: As in `save`.
            options: All options of the format.

        Raises:
            AdapterFileError: With all that the format cannot express. Nothing is written then.
        """
        check_expressible(self.refusals(adapter))
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.save(path, adapter, model, options)

    def summary(self, path: Path) -> AdapterSummary:
        """Returns what is in a file."""
        adapter = self.load(path, None, self.options)
        return AdapterSummary(
            tuple(
                LayerSummary(name, each.r, each.alpha, each.elements) for name, each in sorted(adapter.layers.items())
            ),
            {name: value.numel() for name, value in sorted(adapter.values.items())},
            adapter.details,
        )
