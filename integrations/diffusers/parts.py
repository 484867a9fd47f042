"""The parts of a pipeline that can be adapted, as the children of one module."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from lora_plugins import ConfigError, StateError
from lora_plugins.adapter import adapted_layers, model_state
from lora_plugins.errors import listing
from lora_plugins.formats import COMPONENTS
from lora_plugins.inplace import unwrapped

_ATTRIBUTE = "_lora_plugins_parts"
"""Of a pipeline: the module of its parts, which holds the state of their adapters."""


def parts_of(pipe: Any) -> nn.ModuleDict:
    """Returns the parts of a pipeline that can be adapted, by their names in it; always the same object.

    Raises:
        ConfigError: If it is no pipeline of diffusers, or has none of the parts.
        StateError: If a part was replaced while it had adapters, or has adapters of its own or of another pipeline.
    """
    if isinstance(pipe, nn.ModuleDict):
        return pipe
    parts = getattr(pipe, _ATTRIBUTE, None)
    found = _components(pipe)
    alone = [name for name, part in found.items() if model_state(part) is not None]
    if alone:
        raise StateError(
            f"{', '.join(alone)} of the {type(pipe).__name__} has adapters of its own: go on with LoraModel for it, or "
            "unload them first."
        )
    if parts is not None and not _same(parts, found) and model_state(parts) is not None:
        raise StateError(
            f"A part of the {type(pipe).__name__} was replaced or taken out while it had adapters: it had "
            f"{', '.join(parts)}, and has {', '.join(found)}. Put it back and call LoraPipeline(pipe).unload() first; "
            "parts that are not needed are taken out before adapters are put on."
        )
    if parts is None or not _same(parts, found):
        parts = nn.ModuleDict(found)
        _check_unshared(pipe, parts)
        setattr(pipe, _ATTRIBUTE, parts)
    parts.training = any(part.training for part in found.values())  # a new module would be in training mode
    return cast(nn.ModuleDict, parts)


def parts_beside(pipe: Any) -> dict[str, nn.Module]:
    """Returns the modules of a pipeline that are none of those parts, such as a VAE or a prior, by their names."""
    if isinstance(pipe, nn.ModuleDict):
        return {}
    return {
        name: part for name, part in pipe.components.items() if name not in COMPONENTS and isinstance(part, nn.Module)
    }


def _check_unshared(pipe: Any, parts: nn.ModuleDict) -> None:
    """Checks that no part of a pipeline has adapters that another pipeline has put on it."""
    shared = dict.fromkeys(name.partition(".")[0] for name in adapted_layers(parts))
    if shared:
        raise StateError(
            f"{listing(shared)} of this {type(pipe).__name__} has adapters of another pipeline, which was made with "
            "the same parts, as from_pipe does, or it was copied by itself from one. They act here too. Their handle "
            "is that of the other pipeline: use that one, or call its unload() first."
        )


def _components(pipe: Any) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ConfigError(
            f"{type(pipe).__name__} is no pipeline of diffusers. Give what DiffusionPipeline.from_pretrained returns; "
            "LoraModel adapts a single module."
        )
    found = {name: unwrapped(components[name]) for name in COMPONENTS if isinstance(components.get(name), nn.Module)}
    if not found:
        empty = [name for name in COMPONENTS if name in components]
        if empty:
            raise ConfigError(
                f"{listing(empty)} of the {type(pipe).__name__} is None. Load it first, as load_components() of a "
                "modular pipeline does."
            )
        raise ConfigError(
            f"{type(pipe).__name__} has none of the parts that are adapted: {', '.join(COMPONENTS)}. LoraModel adapts "
            "another one by itself."
        )
    return found


def _same(parts: nn.ModuleDict, found: Mapping[str, nn.Module]) -> bool:
    return parts.keys() == found.keys() and all(parts[name] is module for name, module in found.items())
