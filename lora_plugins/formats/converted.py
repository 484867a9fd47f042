"""Conversion of a file without a model: between formats that know layers by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_plugins.errors import AdapterFileError, ConfigError
from lora_plugins.formats.components import ORIGINAL
from lora_plugins.formats.portable_format import PortableFormat
from lora_plugins.plugins import AdapterFormat


def convert(
    source: Path,
    source_format: AdapterFormat,
    read_options: Mapping[str, Any],
    target: Path,
    target_format: AdapterFormat,
    write_options: Mapping[str, Any],
) -> Path:
    """Writes an adapter in another format; returns the path.

    Args:
        source: The file or folder to read.
        source_format: Its format.
        read_options: All options of that.
        target: The file or folder to write.
        target_format: Its format.
        write_options: All options of that.

    Raises:
        ConfigError: If one of the formats needs a model.
        AdapterFileError: If the source is damaged, or cannot be expressed in the other format. Nothing is written then.
    """
    needed = f"From {source_format.name!r} to {target_format.name!r} the base model is needed: --model MODULE:NAME"
    if not (
        isinstance(source_format, PortableFormat)
        and isinstance(target_format, PortableFormat)
        and source_format.full_names
    ):
        raise ConfigError(f"{needed}, as `lora-plugins convert --help` has some.")
    adapter = source_format.load(source, None, read_options)
    if any(name.startswith(f"{ORIGINAL}.") for name in adapter.layers):
        raise ConfigError(f"{source} names layers as the original implementation does. {needed}.")
    if adapter.changes or any(layer.bias is not None for layer in adapter.layers.values()):
        raise ConfigError(f"{source} adds to values of the base, which are needed for it. {needed} --weights FILE.")
    if adapter.init != "kaiming":
        raise AdapterFileError(
            f"The adapter was started by {adapter.init!r}, whose base has to be computed from the weights of the "
            "model: --model MODULE:NAME --weights FILE."
        )
    return target_format.write_portable(target, adapter, None, write_options)
