"""Original names of layers: those of the implementation that a model was published with, which diffusers has changed.

Scripts that train on those implementations write them: `input_blocks.4.1` of Stable Diffusion is `down_blocks.1.
attentions.0`, and `img_attn.qkv` of Flux is one layer for three; for transformers, there are `original_tables`. Names
that a model has no layers for are left out.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, count, takewhile
from typing import TypeVar, cast

import torch
from torch import nn

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.changes import Beside
from lora_plugins.formats.components import class_names
from lora_plugins.formats.original_tables import IN_COMFYUI, TRANSFORMERS, Table
from lora_plugins.formats.portable import PortableLayer
from lora_plugins.inplace import full_name, model_modules, own_parameters, submodule
from lora_plugins.plan import former_names
from lora_plugins.utils import path_starts

Entry = TypeVar("Entry", PortableLayer, Beside)

_UNET: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
"""By names in a UNet of diffusers, those of Stable Diffusion, except for the blocks on the way down and up."""

_RESNET: Mapping[str, str] = {
    ".norm1": ".in_layers.0",
    ".conv1": ".in_layers.2",
    ".norm2": ".out_layers.0",
    ".conv2": ".out_layers.3",
    ".time_emb_proj": ".emb_layers.1",
    ".conv_shortcut": ".skip_connection",
}
"""By what follows the name of a residual block, the same of Stable Diffusion."""

_SWAPPED = frozenset({"AdaLayerNormContinuous", "AuraFlowPreFinalBlock", "SwiGLU"})
"""Classes of diffusers whose linear layer has the two halves of its outputs the other way round than the original.

The first two have the scale before the shift, the last what is gated before the gate.
"""


@dataclass(frozen=True)
class Place:
    """Where the layer of a file is in a model.

    Args:
        names: The layers that it is: several where it has their outputs one after the other.
        swapped: Whether the two halves of its outputs are the other way round in the model.
    """

    names: tuple[str, ...]
    swapped: bool = False

    def put(self, key: str, layer: Entry, model: nn.Module) -> dict[str, Entry]:
        """Returns a layer by its names in the model; where there are several, each has its rows of B and all of A.

        Raises:
            AdapterFileError: If the layers of the model do not have as many outputs together.
        """
        if self.swapped:
            layer = layer.with_rows(partial(torch.roll, shifts=layer.outputs // 2, dims=0))
        if len(self.names) == 1:
            return {self.names[0]: layer}
        sizes = [cast(int, submodule(model, name).out_features) for name in self.names]
        if sum(sizes) != layer.outputs:
            raise AdapterFileError(
                f"{key!r} of the adapter has {layer.outputs} outputs, and {listing(self.names)} have {sum(sizes)} "
                "together."
            )
        starts = accumulate(sizes, initial=0)
        return {
            name: layer.with_rows(partial(torch.narrow, dim=0, start=start, length=size))
            for name, start, size in zip(self.names, starts, sizes, strict=False)
        }


def original_places(
    model: nn.Module, tables: Sequence[Mapping[str, Table]] = (TRANSFORMERS, IN_COMFYUI)
) -> dict[str, Place]:
    """Returns by original name where a layer is in a model of diffusers, or a parameter; empty for other models.

    Names of the first tables come first.
    """
    classes = class_names(model)
    modules = model_modules(model)
    names = dict.fromkeys(entry.name for entry in modules)
    if "UNet2DConditionModel" in classes:
        return {original: Place((name,)) for name, original in _of_unet(names)}
    names |= dict.fromkeys(own_parameters(modules))
    places = {}
    own = [table for by_class in tables for name, table in by_class.items() if name in classes]
    for original, ours in chain.from_iterable(_of_transformer(table, names) for table in own):
        owner = submodule(model, ours[0].rpartition(".")[0])
        places[original] = Place(ours, type(owner).__name__ in _SWAPPED)
    return places


def put(layers: Mapping[str, Entry], places: Mapping[str, Place], model: nn.Module) -> dict[str, Entry]:
    """Returns layers of a file, or what is beside them, by their names in a model; those without a place are left out.

    Raises:
        AdapterFileError: If two layers have one place, or one has other outputs than the model's.
    """
    found: dict[str, Entry] = {}
    for key in (key for key in places if key in layers):
        own = places[key].put(key, layers[key], model)
        if twice := own.keys() & found.keys():
            raise AdapterFileError(f"{key!r} and another layer of the adapter are both {listing(twice)} of the model.")
        found |= own
    return found


def by_own_names(layers: Mapping[str, Entry], model: nn.Module) -> dict[str, Entry]:
    """Returns layers with original names, or their own ones, by the names that they have in a model; see `put`.

    Converters that know no names put dots for underscores, such as `context.refiner`: what is no name is compared
    without dots.
    """
    places = original_places(model)
    own = {name for entry in model_modules(model) for name in entry.names}
    unknown = layers.keys() - places.keys() - own
    known = places_without_dots(model, places) if unknown else {}
    for name in unknown:
        if len(found := known.get(name.replace(".", "_"), [])) == 1:
            places[name] = found[0]
    return put(layers, {name: places.get(name, Place((name,))) for name in layers}, model)


def places_without_dots(model: nn.Module, original: Mapping[str, Place]) -> dict[str, list[Place]]:
    """Returns where layers are, by their names without dots, from the places by original names.

    Former names too, and those in the model of transformers around one: `model.layers` of Qwen's encoder.
    """
    found: dict[str, list[Place]] = {}
    former = former_names(model)
    around = getattr(model, "base_model_prefix", "")
    for entry in model_modules(model):
        place = Place((entry.name,))
        names = dict.fromkeys((*entry.names, former.get(entry.name, entry.name)))
        for name in (*names, *(full_name(around, name) for name in names if around and not hasattr(model, around))):
            places = found.setdefault(name.replace(".", "_"), [])
            if place not in places:
                places.append(place)
    # Original names count first, as in keys with dots: `norm3` of Wan's authors is `norm2` in diffusers.
    return found | {name.replace(".", "_"): [place] for name, place in original.items()}


def is_of_transformer(name: str) -> bool:
    """Whether an original name without dots is one of a transformer, and not of a UNet."""
    return name.startswith(("double_blocks_", "single_blocks_", "joint_blocks_"))


def _of_unet(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the layers of a UNet and their original names."""
    blocks = {**_UNET, **dict(_on_the_way(names))}
    for name in names:
        block = next((start for start in path_starts(name) if start in blocks), None)
        if block is not None:
            inner = name.removeprefix(block)
            yield name, blocks[block] + _RESNET.get(inner, inner)


def _on_the_way(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the down and up blocks of a UNet, numbered consecutively, with their original names."""
    down = count(1)
    for block in _counted("down_blocks", names):
        for n, _ in enumerate(_counted(f"{block}.resnets", names)):
            number = next(down)
            yield f"{block}.resnets.{n}", f"input_blocks.{number}.0"
            yield f"{block}.attentions.{n}", f"input_blocks.{number}.1"
        if f"{block}.downsamplers.0.conv" in names:
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{next(down)}.0.op"
    up = count()
    for block in _counted("up_blocks", names):
        for n, _ in enumerate(_counted(f"{block}.resnets", names)):
            number = next(up)
            yield f"{block}.resnets.{n}", f"output_blocks.{number}.0"
            yield f"{block}.attentions.{n}", f"output_blocks.{number}.1"
        behind = 2 if f"{block}.attentions.0" in names else 1
        yield f"{block}.upsamplers.0.conv", f"output_blocks.{number}.{behind}.conv"


def _of_transformer(table: Table, names: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields original names and the layers of a transformer that are in each."""
    for original, ours in table.items():
        for numbers in _numbers(ours[0], names):
            found = tuple(_numbered(name, numbers) for name in ours)
            if all(name in names for name in found):
                yield _numbered(original, numbers), found


def _numbers(name: str, names: Collection[str]) -> list[tuple[str, ...]]:
    """Returns what each `*` of a name stands for in the names of layers."""
    if "*" not in name:
        return [()]
    expression = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
    return [match.groups() for each in names if (match := expression.fullmatch(each))]


def _numbered(name: str, numbers: Iterable[str]) -> str:
    """Returns a name with a number for each `*`."""
    for number in numbers:
        name = name.replace("*", number, 1)
    return name


def _counted(name: str, names: Collection[str]) -> Iterator[str]:
    """Yields the members of a list of modules by full name."""
    return takewhile(lambda member: member in names, (f"{name}.{n}" for n in count()))
