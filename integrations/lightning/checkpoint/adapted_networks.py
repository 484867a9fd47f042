"""Adapted networks among the hyperparameters of a module, which it also has as parts: a file leaves them out."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from lora_plugins.adapter import adapter_tensors
from lora_plugins.inplace import is_frozen
from lora_plugins.integrations.lightning.checkpoint.attribute_dicts import HYPERPARAMETERS


def without_networks(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint whose hyperparameters have no adapted networks, which would bring their base along."""
    saved = checkpoint.get(HYPERPARAMETERS, {})
    left_out = adapted_networks(saved)
    if not left_out:
        return dict(checkpoint)
    return {**checkpoint, HYPERPARAMETERS: {key: value for key, value in saved.items() if key not in left_out}}


def adapted_networks(hyperparameters: Any) -> set[str]:
    """Returns the names of hyperparameters that are adapted networks, or hold some.

    A network of which only norms are frozen for an adapter is an adapted one as well.
    """
    named = hyperparameters.items() if isinstance(hyperparameters, dict) else ()
    return {name for name, value in named if any(_is_adapted(network) for network in _networks(value))}


def _networks(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
        return
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name, None) for field in fields(value)]
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _networks(each)


def _is_adapted(network: nn.Module) -> bool:
    return bool(adapter_tensors(network)) or any(map(is_frozen, network.modules()))
