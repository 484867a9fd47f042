"""What planning knows of a model: its modules, their weights, and its own parameters, as plain data.

A plan is a function of these records, so it can be made, and tested, without a model.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_plugins.plugins import LayerPlugin, Slot, Storage
from lora_plugins.utils import within

WeightKey = int | tuple[str, str]
"""Identifies a weight: the same for all layers that share a parameter, of its own where it is computed."""


@dataclass(frozen=True)
class Weight:
    """One weight of a layer.

    Args:
        key: Which weight it is.
        shape: `(out, in)` of its matrix view.
        dtype: Its type.
        computed: Whether it is no parameter of the layer: a buffer, or what a parametrization or a hook computes.
        on_meta: Whether it has no values yet.
        problem: Why an update cannot be added to it.
        stored: How it is stored; None if it is dense.
        foreign: Which library has quantized it; empty if none did.
        breaks: Whether its problem makes a backward through the layer wrong, adapted or not.
    """

    key: WeightKey
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    computed: bool = False
    on_meta: bool = False
    problem: str = ""
    stored: Storage | None = None
    foreign: str = ""
    breaks: bool = False


@dataclass(frozen=True)
class Site:
    """One module of a model.

    Args:
        names: Its full names, the first one first; several where it stands in the model more than once.
        class_name: Name of its class, without adapters.
        class_path: Import path of its class, likewise.
        computes_as: Import paths of its class and of the bases that compute the same.
        plugin: The layer type that serves it; None if there is none.
        slots: Where a whole-layer adapter goes.
        parts: The slots of the parts of a fused layer, by part.
        weights: The weights of all slots by attribute name.
        biases: Attribute names of its biases.
        has_parameters: Whether it owns parameters itself.
        matrices: Attribute names of its own parameters that have two dimensions or more.
        foreign_adapter: Whether it belongs to an adapter of another library.
        has_statistics: Whether its forward moves buffers in training mode.
        scripted: Whether it is a TorchScript module.
        foreign: Attributes of another LoRA library that stand where ours would go.
        failure: What the plugin raised when it was asked about the layer.
        fixed_class: Why the layer cannot be given another class.
        adapted: Whether it has an adapter.
    """

    names: tuple[str, ...]
    class_name: str
    class_path: str = ""
    computes_as: tuple[str, ...] = ()
    plugin: LayerPlugin[Any] | None = None
    slots: tuple[Slot, ...] = ()
    parts: Mapping[str, Slot] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    has_parameters: bool = False
    matrices: tuple[str, ...] = ()
    foreign_adapter: bool = False
    has_statistics: bool = False
    scripted: bool = False
    foreign: tuple[str, ...] = ()
    failure: Exception | None = None
    fixed_class: str = ""
    adapted: bool = False

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]


@dataclass(frozen=True)
class OwnParameter:
    """One parameter of the model itself.

    Args:
        key: Which weight it is.
        size: The number of values that it stands for: all of a dense weight, for one tensor of a stored one.
        floating: Whether its type is a floating one, and not only looks like one to its users.
        dtype: Its type.
        lazy: Whether it has no shape yet.
        aliases: Its other full names, where modules share it, or a module that has it has several names.
    """

    key: WeightKey
    size: int
    floating: bool = True
    dtype: torch.dtype = torch.float32
    lazy: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """A model, as planning sees it.

    Args:
        sites: Its modules, in order, each once.
        parameters: Its own parameters by full name, a tied one under its first name only.
        buffers: Full names of the buffers that a state dict has.
    """

    sites: tuple[Site, ...]
    parameters: Mapping[str, OwnParameter]
    buffers: tuple[str, ...] = ()

    def outside(self, saved: Container[str]) -> list[Site]:
        """Returns the modules that are not trained in full, by the names of those that are."""
        return [site for site in self.sites if not any(within(name, saved) for name in site.names)]
