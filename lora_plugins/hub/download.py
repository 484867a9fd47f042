"""Adapters on the Hub by their location: `hf://owner/name`, `hf://owner/name/file.safetensors@revision`."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from lora_plugins.errors import AdapterFileError, ConfigError
from lora_plugins.hub.client import errors_told, hub
from lora_plugins.plugins import FORMATS, Registry, default_registry

SCHEME = "hf://"

_PART = r"[A-Za-z0-9][\w.-]*"
_LOCATION = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?P<path>(?:/[^/@:\\]+)*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)


@dataclass(frozen=True)
class Location:
    """A place on the Hub.

    Args:
        repository: `owner/name`.
        path: A file or folder in it; empty for the whole.
        revision: A branch, tag or commit; None for the main branch.
    """

    repository: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> "Location":
        """Reads a location.

        Raises:
            ConfigError: If it is none.
        """
        found = _LOCATION.fullmatch(text.removeprefix(SCHEME))
        if found is None or ".." in text:
            raise ConfigError(
                f"{text!r} is no place on the Hub. Write hf://owner/name, or hf://owner/name/path@revision."
            )
        return cls(found["repository"], found["path"].removeprefix("/"), found["revision"])


def located(path: str | Path, registry: Registry | None = None) -> Path:
    """Returns where an adapter is on this machine: a path as it is, one on the Hub in the client's cache.

    From a repository, or a folder in it, only the files that the registered formats know are downloaded, by default
    those of all installed plugins. If the location names a file, that file is downloaded.

    Raises:
        ConfigError: If the location is none, or huggingface_hub is missing.
        AdapterFileError: If there is no such repository, revision or path, or it cannot be reached.
    """
    if not isinstance(path, str) or not path.startswith(SCHEME):
        return Path(path)
    place, client = Location.of(path), hub()
    formats = [owned.plugin for owned in (registry or default_registry()).of(FORMATS).values()]
    names = [f"{below}{name}" for each in formats for name in each.file_names for below in ("", "*/")]
    named = glob.escape(place.path)  # of files whose names have brackets
    wanted = [named, *(f"{named}/{name}" for name in names)] if named else names
    with errors_told(f"Downloading {path!r}"):
        found = client.snapshot_download(place.repository, revision=place.revision, allow_patterns=wanted)
    if not (Path(found) / place.path).exists():
        raise AdapterFileError(f"{path!r} is no file, and no folder with files of an adapter, in {place.repository}.")
    return Path(found) / place.path
