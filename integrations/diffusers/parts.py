"""The parts of a pipeline that can be adapted, as the children of one module."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from lora_plugins import ConfigError

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Their names in pipelines of diffusers, and so in its adapter files."""

_ATTRIBUTE = "_lora_plugins_parts"
"""Of a pipeline: the module of its parts, which holds the state of their adapters."""


def parts_of(pipe: Any) -> nn.ModuleDict:
    """Returns the parts of a pipeline that can be adapted, by their names in it; always the same object.

    Raises:
        ConfigError: If it is no pipeline of diffusers, or has none of the parts.
    """
    if isinstance(pipe, nn.ModuleDict):
        return pipe
    parts = getattr(pipe, _ATTRIBUTE, None)
    found = _components(pipe)
    if parts is None or not _same(parts, found):
        parts = nn.ModuleDict(found)
        setattr(pipe, _ATTRIBUTE, parts)
    return cast(nn.ModuleDict, parts)


def _components(pipe: Any) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ConfigError(
            f"{type(pipe).__name__} is no pipeline of diffusers. Give what DiffusionPipeline.from_pretrained returns; "
            "LoraModel adapts a single module."
        )
    found = {name: components[name] for name in COMPONENTS if isinstance(components.get(name), nn.Module)}
    if not found:
        raise ConfigError(f"{type(pipe).__name__} has none of the parts that are adapted: {', '.join(COMPONENTS)}.")
    return found


def _same(parts: nn.ModuleDict, found: Mapping[str, nn.Module]) -> bool:
    return parts.keys() == found.keys() and all(parts[name] is module for name, module in found.items())
