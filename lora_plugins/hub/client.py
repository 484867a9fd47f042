"""Access to huggingface_hub, with messages for where it is missing or fails."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_plugins.errors import AdapterFileError, ConfigError, sentence


def hub() -> Any:
    """Returns the client.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError("The Hub needs huggingface_hub. Run: pip install 'lora-plugins[hub]'") from error


@contextmanager
def errors_told(what: str) -> Iterator[None]:
    """Turns errors of the client into ours, which say what is done.

    Raises:
        AdapterFileError: From whatever the client raises.
    """
    try:
        yield
    except Exception as error:  # of the client, of what it sends requests with, of the disk
        said = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
        raise AdapterFileError(
            f"{what} is not possible: {type(error).__name__}: {sentence(said)} Look at the name and the revision; for "
            "private repositories log in first: `hf auth login`."
        ) from error
