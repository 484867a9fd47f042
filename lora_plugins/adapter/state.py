"""What an adapted model carries with it, so that a copy or a pickle of the model is adapted as well."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_plugins.adapter.gradients import Guards
from lora_plugins.adapter.lifecycle import CALLS, CONDITIONS, Condition
from lora_plugins.adapter.owned_tensors import OwnedTensors
from lora_plugins.errors import StateError, listing, near
from lora_plugins.inplace import NamedModule, model_modules, state_of, unwrapped
from lora_plugins.plan import Plan
from lora_plugins.utils import Versions

MODEL_STATE = "_lora_model"
"""Attribute of an adapted model that holds its `ModelState`."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model.

    Args:
        plan: What it adapts.
        recipes: By layer name and slot suffix, what its init needs to change the base again.
        fingerprints: Those of the untouched weights that were taken, by full name; see `files.fingerprint`.
        kept: Those of weights as they were before they were moved by hand, by whoever saves them beside the adapter.
        base: Marks of the base's tensors that it does not hold, as they were when it was added.
    """

    plan: Plan
    recipes: Mapping[tuple[str, str], Mapping[str, Tensor]]
    fingerprints: dict[str, tuple[object, dict[str, float]]] = field(default_factory=dict)
    kept: dict[str, dict[str, float]] = field(default_factory=dict)
    base: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """What acts inside a `with` block, in place of the active adapters.

    Args:
        call: The call that opened it.
        adapters: Names of the adapters that act.
        rows: The adapter of each row of a mixed batch; None where all rows have all of them.
    """

    call: str
    adapters: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None


@dataclass(frozen=True)
class Outside:
    """What is in place outside of all blocks, restored when the last one ends.

    Args:
        versions: The versions of the model's own tensors whose value depends on the active adapter.
        trained: Those of them that require a gradient, by full name.
    """

    versions: Versions
    trained: Mapping[str, Tensor]


@dataclass
class ModelState:
    """All adapters of a model and which of them act.

    Args:
        adapters: The adapters by name.
        active: Those whose update acts, in order; merged ones included.
        weights: What the updates of active adapters are multiplied by, where that is not 1.
        merged: Those of the active ones whose update is in the weights.
        trainable: Whether active adapters are trained.
        values: The model's own tensors that depend on the active adapter.
        requires_grad: Which parameters required a gradient before there were adapters, or one for what was built since.
        leaving: Whether `merge_and_unload` has begun: some layers may be merged already.
        blocks: The `with` blocks that are open, the innermost last.
        outside: What the last of them puts back; None while none is open.
        guards: Of the tensors that were frozen.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    trainable: bool = True
    values: OwnedTensors = field(default_factory=OwnedTensors)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    leaving: bool = False
    blocks: tuple[Block, ...] = ()
    outside: Outside | None = None
    guards: Guards = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        self.check("copy")
        return {**self.__dict__, "guards": {}}  # a copy has no forward that a backward could follow

    def summary(self) -> str:
        """Returns the adapters in one line: what each of them adapts, and whether it acts."""
        acts = dict.fromkeys(self.active, "active") | dict.fromkeys(self.merged, "merged")
        shown = [
            f"{name!r} on {each.plan.extent} ({acts.get(name, 'inactive')})" for name, each in self.adapters.items()
        ]
        return ", ".join(shown)

    def adapter(self, name: str) -> Adapter:
        """Returns an adapter by name.

        Raises:
            StateError: If there is none of that name.
        """
        if name not in self.adapters:
            raise StateError(f"The model has no adapter {name!r}. {near(str(name), self.adapters)}")
        return self.adapters[name]

    @property
    def unmerged(self) -> tuple[str, ...]:
        """The active adapters whose update is not in the weights."""
        # A list: asked before each forward, where compilers may look at every frame, and trace none of a generator.
        return tuple([name for name in self.active if name not in self.merged])

    @property
    def acting(self) -> Block:
        """What acts now: the innermost block, or else the active adapters that are not merged."""
        return self.blocks[-1] if self.blocks else Block("", self.unmerged)

    def check(self, call: str) -> None:
        """Consults the table `lifecycle.CALLS` for the call of a name.

        Raises:
            StateError: If the call is refused in the model's state.
        """
        # Anything that is true or not: torch.compile of torch 2.8 does not know `bool` of a tuple.
        holds: Mapping[Condition, object] = {
            "leaving": self.leaving,
            "in a block": self.blocks,
            "in a mixed batch": self.acting.rows is not None,
            "merged": self.merged,
        }
        for condition, message in CONDITIONS.items():
            if holds[condition] and condition in CALLS[call].refused:
                block = f"{self.blocks[-1].call}()" if self.blocks else ""
                raise StateError(message.format(doing=CALLS[call].doing, block=block, merged=listing(self.merged)))


def model_state(model: nn.Module) -> ModelState | None:
    """Returns the adapters of a model, compiled or not; None if it has none."""
    state: ModelState | None = unwrapped(model).__dict__.get(MODEL_STATE)
    return state


def present_state(model: nn.Module) -> ModelState:
    """Returns the adapters of a model that had some.

    Raises:
        StateError: If it has none any more.
    """
    state = model_state(model)
    if state is None:
        raise StateError("The model has no adapter any more: it was unloaded. Make a new LoraModel.")
    return state


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that have an adapter, by name."""
    return adapted_among(model_modules(model))


def adapted_among(modules: list[NamedModule]) -> dict[str, nn.Module]:
    """Returns those of some modules that have an adapter, by name."""
    return {entry.name: entry.module for entry in modules if state_of(entry.module) is not None}
