"""Adapters with original names, which ComfyUI reads and what the authors of models train with: a `.safetensors` file.

`diffusion_model.blocks.0.self_attn.q.lora_A.weight` is A of the layer that is `blocks.0.attn1.to_q` in diffusers. A
layer of the original implementation that is several of diffusers has one A and one B.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lora_plugins.errors import AdapterFileError, ConfigError, listing
from lora_plugins.formats.components import ORIGINAL, part_of
from lora_plugins.formats.diffusers import DiffusersFormat, parts_in
from lora_plugins.formats.joined import by_original_names
from lora_plugins.formats.kohya import number
from lora_plugins.formats.pipelines import without_rslora
from lora_plugins.formats.portable import PortableAdapter
from lora_plugins.formats.tensor_file import write_tensors
from lora_plugins.inplace import submodule

_DENOISERS = frozenset({"unet", "transformer"})


class ComfyFormat(DiffusersFormat):
    """A file of the denoiser alone, behind `diffusion_model`; what is beside it in a file is read as diffusers' is.

    Options: those of the format of diffusers.
    """

    name = "comfyui"
    file_names = ()
    options: ClassVar[Mapping[str, Any]] = DiffusersFormat.options

    def recognizes(self, path: Path) -> bool:
        """Whether a file, or that of a folder, has keys behind `diffusion_model`."""
        return ORIGINAL in parts_in(path)

    def refusals(self, adapter: PortableAdapter) -> list[str]:
        """Returns what the format has no form for: DoRA too, whose norms ComfyUI divides by those of the base."""
        return [
            *super().refusals(adapter),
            *(
                f"{name!r}: of DoRA ComfyUI computes something else. Train without it, or merge the adapter"
                for name, layer in adapter.layers.items()
                if layer.magnitude is not None
            ),
        ]

    def save(self, path: Path, adapter: PortableAdapter, model: nn.Module | None, options: Mapping[str, Any]) -> Path:
        """Writes a file; see `PortableFormat`."""
        if path.suffix != ".safetensors":
            raise AdapterFileError(f"{path}: this format is a file, whose name ends in .safetensors.")
        if model is None:
            raise ConfigError(f"The base model tells the original names of layers, for {path}: --model MODULE:NAME.")
        places = part_of(adapter.layers, model, options["component"])
        if others := {part for part, _ in places.values()} - _DENOISERS:
            raise AdapterFileError(
                f"{listing(sorted(others))} has no form in this format, which is of denoisers. The option component "
                "writes one of several parts, and format='kohya' has text encoders."
            )
        layers = without_rslora(adapter)
        full, (_, name) = next(iter(places.items()))
        denoiser = submodule(model, full.removesuffix(name).removesuffix("."))
        original = by_original_names({name: layers[full] for full, (_, name) in places.items()}, denoiser)
        tensors = {
            f"{ORIGINAL}.{name}.{ending}": tensor
            for name, layer in original.items()
            for ending, tensor in {
                "lora_A.weight": layer.A,
                "lora_B.weight": layer.B,
                "alpha": number(layer.alpha),
            }.items()
        }
        write_tensors(path, tensors, {"format": "pt"})
        return path
