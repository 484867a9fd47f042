"""Our own adapter folder, as a format among the others."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_plugins.errors import counted
from lora_plugins.files import MANIFEST, TENSOR_FILE, TENSOR_FILES, read, write
from lora_plugins.plugins import OWN_FORMAT, AdapterFormat, AdapterSummary, LayerSummary, PackedAdapter, Registry


class OwnFormat(AdapterFormat):
    """The folder that `lora_plugins.files` reads and writes."""

    name = OWN_FORMAT
    file_names = (MANIFEST, TENSOR_FILES)

    def recognizes(self, path: Path) -> bool:
        """Whether a folder has our manifest, or our tensors where that is missing."""
        return (path / MANIFEST).is_file() or any(TENSOR_FILE.fullmatch(each.name) for each in path.glob("adapter-*"))

    def read(
        self, path: Path, model: nn.Module, registry: Registry | None, options: Mapping[str, Any]
    ) -> PackedAdapter:
        """Reads the folder; it is checked against the model when it is loaded."""
        return read(path)

    def write(
        self,
        path: Path,
        packed: PackedAdapter,
        model: nn.Module,
        registry: Registry | None,
        options: Mapping[str, Any],
    ) -> Path:
        """Writes the folder."""
        return write(path, packed)

    def summary(self, path: Path) -> AdapterSummary:
        """Returns what the folder holds."""
        packed = read(path)
        manifest, tensors = packed.manifest, packed.tensors
        sizes: Counter[str] = Counter()
        for key, tensor in tensors.items():
            sizes[key.rpartition("/")[0]] += tensor.numel()
        values = {
            key.removeprefix("value/"): t.numel() for key, t in sorted(tensors.items()) if key.startswith("value/")
        }
        config = manifest["config"]
        details = {
            "written by": f"lora_plugins {manifest['lora_plugins']}",
            "init": str(config.get("init")),
            "variant": str(config.get("variant")),
            "dropout": str(config.get("dropout")),
            **({"base": _stored(manifest["stored"])} if manifest.get("stored") else {}),
        }
        return AdapterSummary(
            tuple(
                LayerSummary(name, each["r"], each["alpha"], sizes[f"lora/{name}"])
                for name, each in manifest["layers"].items()
            ),
            values,
            details,
        )


def _stored(entries: Mapping[str, Mapping[str, Any]]) -> str:
    counts = Counter(entry["storage"] for entry in entries.values())
    return ", ".join(f"{counted(count, 'weight')} stored as {name}" for name, count in counts.items())
