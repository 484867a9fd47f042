"""Adapters as NumPy archives: `NAME/A`, `NAME/B` and `NAME/alpha` for each layer."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_plugins import AdapterFileError, FormatRegistrar, hookimpl
from lora_plugins.formats import PortableAdapter, PortableFormat, PortableLayer, replace_files

PARTS = {"A", "B", "alpha"}


class NpzFormat(PortableFormat):
    """A NumPy archive of plain LoRA on layers whose weights are matrices."""

    name = "npz"
    file_names = ("*.npz",)

    def recognizes(self, path: Path) -> bool:
        """An archive with an alpha."""
        return path.is_file() and zipfile.is_zipfile(path) and any(key.endswith("/alpha") for key in _keys(path))

    def load(self, path: Path, model: nn.Module | None, options: Mapping[str, Any]) -> PortableAdapter:
        """Reads an archive, none of whose arrays may be a pickle."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise AdapterFileError(f"{path} is damaged: {error}.") from error
        layers: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            name, _, part = key.rpartition("/")
            layers.setdefault(name, {})[part] = array
        wrong = [name for name, parts in layers.items() if parts.keys() != PARTS]
        if wrong:
            raise AdapterFileError(f"{path}: {wrong} has not just {sorted(PARTS)}.")
        return PortableAdapter(
            {
                name: PortableLayer(torch.from_numpy(each["A"]), torch.from_numpy(each["B"]), float(each["alpha"]))
                for name, each in layers.items()
            }
        )

    def refusals(self, adapter: PortableAdapter) -> list[str]:
        """DoRA, rsLoRA, and what is trained in full."""
        dora = [name for name, layer in adapter.layers.items() if layer.magnitude is not None]
        rslora = ["use_rslora"] if adapter.use_rslora else []
        return [f"{what!r} has no form in an archive" for what in (*dora, *rslora, *adapter.values)]

    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes an archive under just that name: given a path, NumPy puts an ending behind it."""
        arrays: dict[str, Any] = {}
        for name, layer in adapter.layers.items():
            arrays |= {f"{name}/A": _array(layer.A), f"{name}/B": _array(layer.B), f"{name}/alpha": layer.alpha}
        archive = io.BytesIO()
        np.savez(archive, **arrays)
        replace_files({path: archive.getvalue()})
        return path


def _array(factor: Tensor) -> np.ndarray:
    """The values of a factor; NumPy has no bfloat16, in which files of others may be, and float32 holds its values."""
    return (factor.float() if factor.dtype == torch.bfloat16 else factor).numpy()


def _keys(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


@hookimpl
def lora_plugins_register_formats(registrar: FormatRegistrar) -> None:
    """Registers the format."""
    registrar.add(NpzFormat())
