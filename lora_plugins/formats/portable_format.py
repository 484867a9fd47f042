"""The base class of formats that hold an A and a B for each layer name; what does not depend on the format is here."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_plugins.adapter import ADAPTER_NAME
from lora_plugins.errors import AdapterFileError, PluginError
from lora_plugins.field_checks import shown
from lora_plugins.formats.from_packed import check_expressible, portable_of
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.to_packed import packed_for
from lora_plugins.plugins import AdapterFormat, AdapterSummary, LayerSummary, PackedAdapter, Registry
from lora_plugins.utils import is_dense


class UntoldError(AdapterFileError):
    """A file has two readings, and whoever loads it has to say by an option which is meant.

    What `load` of a `PortableFormat` raises for one, naming the options: it is then not loaded, but shown.
    """


class PortableFormat(AdapterFormat):
    """A format of layers with an A and a B: `class MyFormat(PortableFormat)` with `load` and `save`.

    Attributes:
        full_names: Whether a file has the full names of layers, so that it can be converted without a model.
        first_reading: Options that say which of two readings is shown of a file where `load` raises an `UntoldError`.
    """

    full_names: ClassVar[bool] = True
    first_reading: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def load(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Reads a file.

        Args:
            path: The file or folder.
            model: The model that it is read for, where names have to be found in one; None to say what is in it.
            options: All options of the format.

        Raises:
            AdapterFileError: If the file is damaged or says what cannot be expressed here, or a key is left over.
            UntoldError: If it has two readings, and the options do not say which is meant.
        """

    @abstractmethod
    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes a file, in place of the one that is there; returns its path.

        `replace_files` writes several files, or none if the disk is full, so that a new file never meets an old one.

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
        return packed_for(model, self._loaded(path, model, options), registry)

    def _loaded(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Returns what `load` gives, once it is what a format has to give.

        Raises:
            PluginError: If it is not.
        """
        adapter = self.load(path, model, options)
        if wrong := _wrong(adapter):
            raise PluginError(f"load() of the format {self.name!r} gives {wrong}, reading {path}.")
        return adapter

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
        """Returns what is in a file, of two readings the first, with what has to be said where it is loaded."""
        try:
            return self._summary(path, self.options)
        except UntoldError as error:
            found = self._summary(path, {**self.options, **self.first_reading})
            return replace(found, details={**found.details, "to be said": str(error)})

    def _summary(self, path: Path, options: Mapping[str, Any]) -> AdapterSummary:
        adapter = self._loaded(path, None, options)
        return AdapterSummary(
            tuple(
                LayerSummary(name, each.r, each.alpha, each.elements) for name, each in sorted(adapter.layers.items())
            ),
            {name: value.numel() for name, value in sorted({**adapter.values, **adapter.changes}.items())},
            adapter.details,
        )


def _wrong(adapter: Any) -> str:
    """Says what a format gave that cannot be an adapter; empty if it can be one."""
    if not isinstance(adapter, PortableAdapter):
        return f"{shown(adapter)}, which is no PortableAdapter"
    if not isinstance(adapter.name, str) or not ADAPTER_NAME.fullmatch(adapter.name):
        return f"the name {shown(adapter.name)}, where an adapter's has letters, digits, '_' and '-'"
    for what in ("layers", "values", "changes"):
        named = getattr(adapter, what)
        if not isinstance(named, Mapping) or not all(isinstance(key, str) for key in named):
            return f"{what} that are {shown(named)}, and no mapping by full names"
    for name, layer in adapter.layers.items():
        if not isinstance(layer, PortableLayer):
            return f"{shown(layer)} for {name!r}, which is no PortableLayer"
        if wrong := _wrong_part(name, layer):
            return wrong
    beside = (*adapter.values.items(), *adapter.changes.items())
    odd = [f"{shown(value)} for {name!r}" for name, value in beside if not _is_dense_tensor(value)]
    return f"{odd[0]}, which is no dense tensor" if odd else ""


def _wrong_part(name: str, layer: PortableLayer) -> str:
    """Says which value of a layer is not valid; empty if all are."""
    factors = {"A": layer.A, "B": layer.B}
    given = {part: value for part in ("magnitude", "bias") if (value := getattr(layer, part)) is not None}
    for part, value in {**factors, **given}.items():
        if not _is_dense_tensor(value):
            return f"{shown(value)} for {part} of {name!r}, which is no dense tensor"
    for part, factor in factors.items():
        if factor.dim() < 2:
            return f"{tuple(factor.shape)} for {part} of {name!r}, which is no matrix"
    return "" if isinstance(layer.alpha, Real) else f"{shown(layer.alpha)} for alpha of {name!r}, which is no number"


def _is_dense_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and is_dense(value)
