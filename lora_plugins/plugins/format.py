"""What a format plugin says: which adapter files are its, and how they are read and written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_plugins.plugins.kind import A_NAME, PluginKind, are_options, are_patterns
from lora_plugins.plugins.registry import Registry

OWN_FORMAT = "lora_plugins"
"""Name of our own format, which `save_adapter` writes unless it is asked for another one."""


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as plain data.

    Args:
        manifest: Plain types only: format version, config, layers with rank and scaling, tensors with type and shape,
            fingerprints of the base, versions.
        tensors: The tensors that the manifest lists.
    """

    manifest: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerSummary:
    """One layer of an adapter file.

    Args:
        name: Its name in the file.
        r: Rank.
        alpha: Numerator of the scaling.
        elements: Number of elements of its tensors.
    """

    name: str
    r: int
    alpha: float
    elements: int


@dataclass(frozen=True)
class AdapterSummary:
    """What is in an adapter file, as `lora-plugins inspect` shows it.

    Args:
        layers: Its layers.
        values: Heads, biases and statistics by name, with their numbers of elements.
        details: What else the file says, by what that is called.
    """

    layers: tuple[LayerSummary, ...]
    values: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)


class AdapterFormat(ABC):
    """A format of adapter files, chosen by the file itself or by `save_adapter(path, format=...)`.

    A plugin is stateless. It speaks of adapters as `PackedAdapter`, what `LoraModel.pack` returns; a format of layers
    with an A and a B is simpler to write as a `lora_plugins.formats.PortableFormat`. It consumes every key of a file or
    refuses the file with an `AdapterFileError` that lists the others; and it refuses, by name, what it cannot write.
    Nothing that it reads may be pickled.

    Attributes:
        name: What `save_adapter(path, format=...)` says.
        options: What `format_options` may say of it, with the defaults.
        file_names: The names that its files have in a folder, as shell patterns: what is downloaded of a repository.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    file_names: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Whether a file or folder is of this format, told by names and headers; never raises for one that is not."""

    @abstractmethod
    def read(
        self, path: Path, model: nn.Module, registry: Registry | None, options: Mapping[str, Any]
    ) -> PackedAdapter:
        """Reads an adapter for a model, and touches nothing of it.

        Args:
            path: The file or folder.
            model: The model, with the base's own values in place.
            registry: The plugins to use; by default those that the adapter's config lets load.
            options: All options of the format.

        Raises:
            AdapterFileError: If the file is damaged, does not fit the model, or says what cannot be expressed here.
        """

    @abstractmethod
    def write(
        self,
        path: Path,
        packed: PackedAdapter,
        model: nn.Module,
        registry: Registry | None,
        options: Mapping[str, Any],
    ) -> Path:
        """Writes an adapter, in place of what is there; returns the path.

        Args:
            path: The file or folder.
            packed: The adapter.
            model: The model that it is of, with the base's own values in place.
            registry: As in `read`.
            options: All options of the format.

        Raises:
            AdapterFileError: If the format cannot express the adapter, naming what and where. Nothing is written.
        """

    @abstractmethod
    def summary(self, path: Path) -> AdapterSummary:
        """Returns what is in a file, without a model.

        Raises:
            AdapterFileError: If the file is damaged.
        """


FORMATS = PluginKind[AdapterFormat](
    name="formats",
    title="format",
    base=AdapterFormat,
    rules={
        "name": A_NAME,
        "options": (are_options, "a mapping of names to defaults"),
        "file_names": (are_patterns, "a list of names or shell patterns"),
    },
    claims={"format": lambda plugin: plugin.name},
)
"""Formats of adapter files."""
