"""What a storage plugin says: how a dense weight becomes stored tensors, and how they become a dense weight again."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_plugins import words
from lora_plugins.errors import ConfigError, PluginError, noted
from lora_plugins.field_checks import check_known_options, is_plain, is_whole
from lora_plugins.plugins.kind import A_NAME, PluginKind, are_options
from lora_plugins.utils import in_full, is_dense, shape_or_value

COMMON_OPTIONS: Mapping[str, Any] = {"min_size": 4096}
"""Options that all storages have, with their defaults: weights with fewer than `min_size` elements stay dense."""


class StoragePlugin(ABC):
    """How a dense weight is stored in fewer bytes, and made dense again.

    A plugin is stateless, and works on any device in operations that give the same bits on all of them: an adapter
    file holds a checksum of what is stored, not the weights. A maximum, a product and a comparison do; a sum over
    many values does not.

    Attributes:
        name: The name that `LoraConfig.quantize` asks for.
        options: The keys that `quantize_options` may have, with their defaults; `min_size` is one in any case.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises an error for a value that an option cannot have; unknown keys were refused before.

        Args:
            options: `options` of the class, updated with those of the config.

        Raises:
            ConfigError: If a value is wrong, naming the option.
        """

    @abstractmethod
    def store(self, weight: Tensor, options: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Returns what is stored of a weight, by names that can be attributes; at least one tensor of integers.

        Args:
            weight: Any shape, float32, finite, in row-major order. Read only.
            options: All options.
        """

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], shape: torch.Size, options: Mapping[str, Any]) -> Tensor:
        """Returns the dense weight, float32.

        Args:
            tensors: What `store` returned, on any device.
            shape: Shape of the weight.
            options: All options.
        """

    def rows(
        self, tensors: Mapping[str, Tensor], index: Tensor, shape: torch.Size, options: Mapping[str, Any]
    ) -> Tensor:
        """Returns rows of the dense weight, `(*index.shape, *shape[1:])`, float32; optional, for lookups.

        Args:
            tensors: As in `restore`.
            index: Numbers of rows, any shape of integers.
            shape: Shape of the whole weight.
            options: All options.
        """
        return self.restore(tensors, shape, options)[index]


def storage_options(plugin: StoragePlugin, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of a storage.

    Raises:
        ConfigError: If one that is given is unknown or wrong.
    """
    options = {**COMMON_OPTIONS, **plugin.options}
    check_known_options(f"quantize_options: {plugin.name!r}", given, options)
    options.update(given)
    size = options["min_size"]
    if not is_whole(size) or size < 0:
        raise ConfigError(f"quantize_options: min_size is a number of elements, not {size!r}.")
    with noted(f"check_options() of the storage {plugin.name!r}"):
        plugin.check_options(options)
    return options


@dataclass(frozen=True)
class Storage:
    """A storage with its options.

    Args:
        plugin: The storage.
        options: All its options.
    """

    plugin: StoragePlugin
    options: Mapping[str, Any] = field(default_factory=dict)

    def store(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Returns what is stored of a weight of any floating type."""
        with in_full(weight):
            stored = self.plugin.store(weight.detach().to(torch.float32).contiguous(), self.options)
        if not isinstance(stored, Mapping) or not all(isinstance(each, Tensor) for each in stored.values()):
            raise PluginError(f"store() of the storage {self.plugin.name!r} gives {type(stored)}, not tensors by name.")
        if not stored:
            raise PluginError(f"store() of the storage {self.plugin.name!r} gives no tensor.")
        if wrong := [name for name in stored if not name.isidentifier()]:
            raise PluginError(
                f"store() of the storage {self.plugin.name!r} gives names that no attributes have: {wrong}."
            )
        if wrong := [name for name, tensor in stored.items() if not is_dense(tensor)]:
            raise PluginError(
                f"store() of the storage {self.plugin.name!r} gives {wrong}, which no file can hold: what is stored is "
                "dense. Of a sparse tensor, store its indices and values."
            )
        return stored

    def restore(self, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Returns the dense weight, float32."""
        with in_full(next(iter(tensors.values()))):
            dense = self.plugin.restore(tensors, shape, self.options)
        return self._of_shape("restore", dense, tuple(shape))

    def rows(self, tensors: Mapping[str, Tensor], index: Tensor, shape: torch.Size) -> Tensor:
        """Returns rows of the dense weight, float32."""
        with in_full(index):
            rows = self.plugin.rows(tensors, index, shape, self.options)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return rows  # it warns of sizes that are compared
        return self._of_shape("rows", rows, (*index.shape, *shape[1:]))

    def _of_shape(self, method: str, dense: Any, shape: tuple[int, ...]) -> Tensor:
        """Returns what a method gave, once it has the shape: what is added to it would be broadcast."""
        if not isinstance(dense, Tensor) or dense.shape != shape:
            found = shape_or_value(dense)
            raise PluginError(f"{method}() of the storage {self.plugin.name!r} gives {found!r} for {shape}.")
        return dense

    def rounded(self, weight: Tensor) -> Tensor:
        """Returns the dense value of a weight once it is stored, in its own type."""
        return self.restore(self.store(weight), weight.shape).to(weight.dtype)

    def is_same(self, other: "Storage") -> bool:
        """Whether both give the same bits."""
        return (self.plugin.name, self.given) == (other.plugin.name, other.given)

    @property
    def given(self) -> dict[str, Any]:
        """Its options without those that say which weights are stored."""
        return {key: value for key, value in self.options.items() if key not in COMMON_OPTIONS}

    def __str__(self) -> str:
        return f"{self.plugin.name} with {self.given}"


STORAGES = PluginKind[StoragePlugin](
    name="storages",
    title="storage",
    base=StoragePlugin,
    rules={
        "name": A_NAME,
        "options": (
            lambda value: are_options(value) and not value.keys() & COMMON_OPTIONS.keys() and is_plain(value),
            "a mapping of option names to their defaults, which files can hold: texts, numbers, lists and dictionaries "
            f"of such; without {', '.join(COMMON_OPTIONS)}",
        ),
    },
    claims={"storage": lambda plugin: plugin.name},
    words=words.STORAGES,
)
"""Storages of weights, chosen by `LoraConfig(quantize=...)`."""
