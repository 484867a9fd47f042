"""Weight norm: its two parameters, a length and a direction, can hold any weight, so a merge can leave it in place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_plugins import LoraModel
from lora_plugins.adapter import adapted_layers
from lora_plugins.inplace import full_name, layer_state, length_and_direction, own_tensor, recompute, submodule


@dataclass(frozen=True)
class NormedWeight:
    """A weight that weight norm computes, from parameters that hold its lengths and its directions.

    `dim` is the dimension in which each entry has a length of its own.
    """

    layer: str
    length: str
    direction: str
    dim: int

    def put(self, target: nn.Module, weight: Tensor) -> None:
        """Sets the two parameters so that they give this weight; entries without length keep their direction."""
        length, direction = own_tensor(target, self.length), own_tensor(target, self.direction)
        found = torch.norm_except_dim(weight, 2, self.dim)
        direction.data = torch.where(found == 0, direction.data, weight)
        length.data = found.view_as(length).to(length.dtype)
        recompute(submodule(target, self.layer))


def normed_weights(target: nn.Module) -> dict[str, NormedWeight]:
    """Returns the adapted weights of a module that weight norm computes, by full name."""
    found: dict[str, NormedWeight] = {}
    for name, layer in adapted_layers(target).items():
        for weight in layer_state(layer).weight_names:
            if (parts := length_and_direction(layer, weight)) is not None:
                length, direction, dim = parts
                names = full_name(name, length), full_name(name, direction)
                found[full_name(name, weight)] = NormedWeight(name, *names, dim)
    return found


def sources(weight: str, normed: Mapping[str, NormedWeight]) -> tuple[str, ...]:
    """Returns the names of the parameters that hold a weight: its own, or those that weight norm has."""
    return (normed[weight].length, normed[weight].direction) if weight in normed else (weight,)


def unload_with_norms(
    lora: LoraModel,
    effective: Mapping[str, tuple[str, str]],
    normed: Mapping[str, NormedWeight],
    in_place: Iterable[str],
) -> None:
    """Removes merged adapters and keeps their weights, without ending weight norm as `merge_and_unload` does.

    `effective` has the names of the layer and of the attribute of each merged weight, by full name.
    """
    target = lora.model
    with torch.no_grad():
        layers = {name: (submodule(target, layer), tensor) for name, (layer, tensor) in effective.items()}
        merged = {name: getattr(layer, tensor).detach().clone() for name, (layer, tensor) in layers.items()}
    merged |= {name: own_tensor(target, name).data for name in in_place}
    lora.unmerge_adapter()
    lora.unload()
    for name, value in merged.items():
        if name in normed:
            normed[name].put(target, value)
        else:
            own_tensor(target, name).data = value
