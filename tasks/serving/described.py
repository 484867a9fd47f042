"""What an adapter folder says, all from one version: folders may be replaced while they are read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_plugins.errors import AdapterFileError, LoraError
from lora_plugins.files import MANIFEST, read
from lora_plugins.plugins import PackedAdapter
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.inference import AdapterTask, task_of_adapter
from lora_plugins.tasks.training import Provenance


class ReplacedError(LoraError, RuntimeError):
    """An adapter was replaced or removed while it was asked for."""


@dataclass(frozen=True)
class Described:
    """What an adapter folder says, without its tensors.

    Args:
        name: Name of the folder.
        version: Digest of its manifest, which has those of all else; another adapter of the same name has another one.
        base: Tells the bases apart, also by how they are stored: adapters with the same one share it. One whose init
            has changed the base shares it with nobody.
        task: The task that it is of.
        has_masks: Whether that predicts masks, not labels.
    """

    name: str
    version: str
    base: str
    task: AdapterTask = field(compare=False)
    has_masks: bool = field(compare=False)

    @property
    def provenance(self) -> Provenance:
        """What the manifest says of the task."""
        return self.task.provenance


def describe_folder(path: Path) -> Described:
    """Reads what an adapter folder says.

    Raises:
        WeightsError: If its manifest cannot be read or does not say which task it is of.
    """
    task = task_of_adapter(path)
    manifest, provenance, version = task.manifest, task.provenance, _version(task.manifest)
    own = version if manifest.get("changed") else None  # rebuilt from the base in its own type, bit for bit
    images = [provenance[key] for key in ("mean", "std", "bgr")]
    base = [provenance["class"], _model(task), images, provenance.get("target"), manifest.get("stored", {}), own]
    return Described(path.name, version, json.dumps(base, sort_keys=True), task, task.has_masks)


def read_described(folder: Path, described: Described) -> PackedAdapter:
    """Reads the adapter that was described, and no other one.

    Raises:
        AdapterFileError: If it is damaged.
        ReplacedError: If another one, or none, is in its place.
    """
    path = folder / described.name
    try:
        packed = read(path)
    except AdapterFileError:  # damaged, or put in place or taken away just now
        if _present_version(path) != described.version:
            raise _replaced(described.name) from None
        packed = read(path)
    if _version(packed.manifest) != described.version:
        raise _replaced(described.name)
    return packed


def _model(task: AdapterTask) -> Mapping[str, Any]:
    arguments = task.provenance["arguments"]
    model = arguments.get("model") if isinstance(arguments, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("num_classes"), int):
        raise WeightsError(
            f"{task.path} is of no task that can be served: its {MANIFEST} names no model with classes. "
            "Give the folder that a fit of a classifier or a segmenter has left."
        )
    return model


def _present_version(path: Path) -> str | None:
    """The version that is there now; None where there is none."""
    try:
        return _version(json.loads((path / MANIFEST).read_bytes()))
    except (OSError, ValueError):
        return None


def _version(manifest: Mapping[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _replaced(name: str) -> ReplacedError:
    return ReplacedError(f"The adapter {name!r} was replaced or removed while it was asked for. Ask again.")
