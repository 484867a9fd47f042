"""Refuses layers whose own forward reads the base's weight directly, so that an adapter would do nothing.

`dict(self.named_parameters())["weight"]`, as in layers for meta-learning, is the base's own, and so is a reference that
a layer keeps.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lora_plugins.errors import StateError, listing
from lora_plugins.inplace.layer_state import base_class_of, layer_state


def check_reads(layer: nn.Module, given: Collection[str], inputs: Collection[Any], output: Any) -> None:
    """Checks that a call of a layer has read its weights from where its adapters act.

    A call that returns an empty tensor or one of its inputs needs no weight: layers for detection return the former for
    an empty input, layers that are skipped at random (stochastic depth) the latter.

    Once a call has read all weights, the state of the layer says so, and no other need be checked.

    Raises:
        StateError: If it has computed without one of the weights.
    """
    if isinstance(output, Tensor) and (output.numel() == 0 or any(output is each for each in inputs)):
        return
    state = layer_state(layer)
    names = {slot.tensor for _, _, slot in state.active_slots()}
    if missed := sorted(names - set(given)):
        raise StateError(
            f"The forward of {state.name!r} ({base_class_of(layer).__name__}) computes without reading "
            f"{listing(missed)} as an attribute of the layer, so an adapter does nothing there: its parameters, or a "
            "reference that it keeps, are the base's. Let it read the attribute, or add the layer to exclude_modules. "
            "If it keeps what it computes in eval(), call train() and eval() of the model again."
        )
    state.is_read = len(names) > 0
