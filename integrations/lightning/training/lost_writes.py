"""Stops a module that writes into the weight of an adapted layer, as the average of a codebook does.

What reading such a weight gives is computed anew each time, so `layer.weight.data.copy_(...)` would be gone at once,
and no version and no parameter shows it. Here it is seen by what the reading has become.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.adapter import adapted_layers
from lora_plugins.errors import listing
from lora_plugins.inplace import full_name, state_of
from lora_plugins.integrations.lightning.module import checksum
from lora_plugins.utils import transforms_are_active

_READINGS = 2
"""How many readings of each weight are kept: `weight.div_(weight.norm())` reads its argument last."""


class LostWrites:
    """Watches the weights that are read from outside of their layers."""

    def __init__(self) -> None:
        self._layers: dict[str, nn.Module] = {}
        self._last: dict[str, deque[tuple[Tensor, int]]] = defaultdict(deque)
        self._written: set[str] = set()

    def start(self, module: nn.Module) -> None:
        """Watches what is adapted of a module by now."""
        self._layers = adapted_layers(module)
        for path, layer in self._layers.items():
            _watch(layer, partial(self._note, path))

    def check(self) -> None:
        """Forgets what was read so far.

        Raises:
            StateError: If some of it was written to.
        """
        for name in [*self._last]:
            self._forget(name, kept=0)
        if self._written:
            raise StateError(
                f"The module writes into {listing(sorted(self._written))} from outside of the layer, as into a "
                "codebook that is moved by averages, or to keep weights in bounds. An adapted layer computes its "
                "weight from the base and the adapter at each read, so what is written into it is lost. Name the layer "
                "in modules_to_save, which trains it in full, or in exclude_modules if nothing trains it, like such a "
                "codebook (requires_grad=False). A hook that loads weights before training has to use load_state_dict; "
                "__init__ and setup may write them directly."
            )

    def stop(self) -> None:
        """Watches no longer."""
        self._last.clear()
        for layer in self._layers.values():
            _watch(layer, None)

    def _note(self, path: str, name: str, weight: Tensor) -> None:
        # A parameter is the base's own, which is watched apart. Tensors of other types may have no values.
        if type(weight) is Tensor and not transforms_are_active():
            full = full_name(path, name)
            self._forget(full, kept=_READINGS - 1)
            self._last[full].append((weight, checksum(weight.detach())))

    def _forget(self, name: str, kept: int) -> None:
        """Drops the oldest readings of a weight except for some: a loop may read it a thousand times."""
        readings = self._last[name]
        while len(readings) > kept:
            weight, before = readings.popleft()
            if checksum(weight.detach()) != before:
                self._written.add(name)


def _watch(layer: nn.Module, on_read: Callable[[str, Tensor], None] | None) -> None:
    if (state := state_of(layer)) is not None:  # else it was unloaded meanwhile
        state.on_read = on_read
