"""What an adapted layer knows of its adapters."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.inplace.class_cache import once_for_each_class
from lora_plugins.plugins import LayerPlugin, PlannedLayer, Slot

STATE = "_lora"
"""Attribute of an adapted layer that holds its `LayerState`."""

OWN_CLASS = "_lora_own_class"
"""Attribute of a generated class: the one that a module would have without it."""


@dataclass(frozen=True)
class Branch:
    """How the active updates of a layer are computed in place of its own forward.

    Args:
        plugin: Whose branch it is.
        always: Whether it replaces the forward always, or only while dropout acts.
        drops: Whether an update has dropout.
        tensors: Attribute names of the weights.
        updates: Adapter, planned layer and slot of each active update.
        rescales: Whether the only update is one that rescales the rows of the weight, and the plugin's branch does so.
    """

    plugin: LayerPlugin[Any]
    always: bool
    drops: bool
    tensors: tuple[str, ...]
    updates: tuple[tuple[str, PlannedLayer, Slot], ...]
    rescales: bool = False

    def acts(self, training: bool) -> bool:
        """Whether the branch replaces the forward, in training mode or not."""
        return self.always or self.rescales or (training and self.drops)


@dataclass
class LayerState:
    """What an adapted layer knows of its adapters.

    Args:
        name: Full name of the layer in the model, for messages.
        adapters: By adapter name, what was planned for the layer; active or not.
        active: Names of those whose update is added at each forward.
        weights: What the update of an active adapter is multiplied by, where that is not 1.
        merged: Weights with merged updates that are not written into a parameter: since something computes them, or
            not yet.
        kept: The untouched values of the parameters that merged updates are written into.
        branch: What computes the active updates, if not the layer's own forward.
        rows: While rows of one batch have adapters of their own: the adapter of each, None for the base.
        index: Then, for each row, the position of its adapter in `active`, or their number for the base; on the layer's
            device, so that no forward copies it there.
        meanwhile: Why the model has other values than its own until they are restored; empty if it has its own.
        held: By thread, the weights that a running call of the layer has read; see `held_weights`.
        is_read: Whether a call of the layer's own forward has read all its weights by their names; see `base_reads`.
        is_kept: Whether an `eval()` has since the last `train()`: forwards in eval mode may use what it has computed.
        on_read: Is called with the name and the value of each weight that is read from outside of the layer's forward.
    """

    name: str
    adapters: dict[str, PlannedLayer] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    branch: Branch | None = None
    rows: tuple[str | None, ...] | None = None
    index: Tensor | None = None
    meanwhile: Literal["", "in a block", "merged"] = ""
    held: dict[int, Any] = field(default_factory=dict)
    is_read: bool = False
    is_kept: bool = False
    on_read: Callable[[str, Tensor], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self.meanwhile == "in a block":
            raise StateError(copy_in_block(self.name))
        return {**vars(self), "held": {}, "on_read": None}

    @property
    def has_branch(self) -> bool:
        """Whether some adapter of the layer has a branch."""
        return any(planned.branch_use != "never" for planned in self.adapters.values())

    @property
    def extended_by(self) -> type[LayerPlugin[Any]] | None:
        """The type of the plugin that adds attributes of its own to the class of the layer; None if it adds none."""
        plugins = (planned.plugin for planned in self.adapters.values() if planned.plugin.class_attributes)
        return next((type(plugin) for plugin in plugins), None)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Attribute names of the weights that some adapter updates."""
        return tuple({slot.tensor: None for planned in self.adapters.values() for slot in planned.slots})

    def active_slots(self) -> Iterator[tuple[str, PlannedLayer, Slot]]:
        """Yields adapter, planned layer and slot of each active update."""
        for name in self.active:
            planned = self.adapters[name]
            for slot in planned.slots:
                yield name, planned, slot

    def active_branch(self) -> Branch | None:
        """Returns what computes the active updates; None if one of them needs the effective weight."""
        updates = tuple(self.active_slots())
        uses = {planned.branch_use for _, planned, _ in updates}
        if not uses or "never" in uses:
            return None
        first = updates[0][1]
        return Branch(
            plugin=first.plugin,
            always=first.branch_use == "always" or self.rows is not None,
            drops=any(planned.settings.dropout for _, planned, _ in updates),
            tensors=tuple(dict.fromkeys(slot.tensor for _, _, slot in updates)),
            updates=updates,
            rescales=len(updates) == 1 and first.rescales and not self.weights,
        )


def copy_in_block(name: str) -> str:
    """Explains why a module cannot be copied or pickled inside a block."""
    return (
        f"{name!r} cannot be copied or pickled inside disable_adapter() or mixed_batch(): the copy would never leave "
        "the block. Leave the `with` block first."
    )


def state_of(layer: nn.Module) -> LayerState | None:
    """Returns the adapter state of a layer; None if it is not adapted."""
    state: LayerState | None = layer.__dict__.get(STATE)
    return state


def layer_state(layer: nn.Module) -> LayerState:
    """Returns the adapter state of an adapted layer."""
    state: LayerState = layer.__dict__[STATE]
    return state


def base_class_of(layer: nn.Module) -> type[nn.Module]:
    """Returns the layer's own class, as it is without adapters, stored weights and rows with values of their own."""
    return own_class(type(layer))


def generated_class(name: str, base: Any, namespace: Mapping[str, Any]) -> type[nn.Module]:
    """Generates a class that extends that of a layer, of the same module: torch.fx tells those of torch by it.

    With any other base beside it, such as a mixin of ours, Python could refuse to give a layer the class: one whose
    class has a base without __dict__, as abstract ones often do, would have another layout.
    """
    of_base = {"__module__": base.__module__, "__doc__": base.__doc__, OWN_CLASS: own_class(base)}
    return type(name, (base,), {**of_base, **namespace})


def constructor(own: Any) -> Callable[..., None]:
    """Returns the `__init__` of a generated class: what `type(module)(...)` makes anew gets the class `own`."""

    @functools.wraps(own.__init__)
    def init(module: nn.Module, /, *args: Any, **kwargs: Any) -> None:
        if not module.__dict__:
            object.__setattr__(module, "__class__", own)
        own.__init__(module, *args, **kwargs)

    return init


def own_class(cls: Any) -> type[nn.Module]:
    """Returns the class that a class was generated from; the class itself if it was not generated.

    Parametrizations of torch (of other tensors) and FSDP2 subclass the class that a layer has, which may be a generated
    one. What is returned then is the same subclass of the layer's own class.
    """
    found: type[nn.Module] = cls
    for generated in cls.__mro__:
        if OWN_CLASS in generated.__dict__:
            own: Any = generated.__dict__[OWN_CLASS]
            found = own if cls is generated else remade(cls, generated, own)  # a compiler would warn of the cache
            break
    return found


@once_for_each_class
def remade(cls: Any, generated: Any, own: Any) -> Any:
    """Returns a class with `own` in the place of `generated` among its bases; the class itself if it is not there."""
    if cls is generated:
        return own
    bases = tuple(remade(base, generated, own) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    return type(cls)(cls.__name__.replace(generated.__name__, own.__name__), bases, dict(vars(cls)))
