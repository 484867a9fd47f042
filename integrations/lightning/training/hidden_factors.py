"""Calls `configure_optimizers` again where it fails on A and B or passes adapted layers over.

Code with a table of all parameters fails, and code that sorts parameters by the exact class of their layer passes over.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import LoraError
from lora_plugins.inplace import STATE, AdapterTensors, layer_state, named_parameters, refresh_class
from lora_plugins.integrations.lightning.module import adapted_weights
from lora_plugins.integrations.lightning.training.optimizer_groups import have_place
from lora_plugins.utils import ending

_LONGEST = 300
"""Characters of an error that the warning cites; some list all parameters."""


def retry_without_factors(module: nn.Module, configure: Callable[[], Any]) -> Any:
    """Returns what `configure` does; if that raises or has no place for A and B, what it returns without them.

    A warning says so. What is no better without A and B stays as it was.
    """
    try:
        configured = configure()
    except LoraError:
        raise
    except Exception as error:
        results = _configured_without_factors(module, configure)
        if not results:
            raise
        cited = f"{type(error).__name__}: {error}"[:_LONGEST]
        said = f"failed, and was called once more as if there were no A and B. The error was: {cited}"
    else:
        if have_place(module, configured):
            return configured
        results = [each for each in _configured_without_factors(module, configure) if have_place(module, each)]
        if not results:
            return configured
        said = "passed over adapted layers, and was called once more as if there were no A and B."
    rank_zero_warn(f"configure_optimizers {said}")
    return results[0]


def _configured_without_factors(module: nn.Module, configure: Callable[[], Any]) -> list[Any]:
    """Returns what `configure` returns as if there were no A and B, or nothing if it fails."""
    results = []
    with suppress(Exception), _without_factors(module):
        results.append(configure())
    return results


@contextmanager
def _without_factors(module: nn.Module) -> Iterator[None]:
    """Hides A and B from whoever lists the modules and parameters of a module, and gives layers their own class.

    So a layer has no children but its own and answers with its own weights. These require a gradient meanwhile, as they
    did before they were adapted: they tell where A and B belong.
    """
    layers = [each for each in module.modules() if STATE in vars(each)]
    active = [(layer, layer_state(layer).active) for layer in layers]
    children = [(layer, *child) for layer in layers for child in layer.named_children()]
    hidden = [(layer, name, child) for layer, name, child in children if isinstance(child, AdapterTensors)]
    owned = named_parameters(module, aliases=True)
    weights = [owned[name] for name in adapted_weights(module) if name in owned]
    thawed = [weight for weight in weights if weight.is_floating_point() and not weight.requires_grad]

    def put_back() -> None:
        for layer, name, factors in hidden:
            layer.add_module(name, factors)
        for layer, names in active:
            layer_state(layer).active = names
            refresh_class(layer)
        for weight in thawed:
            weight.requires_grad_(False)

    with ending(put_back):
        for layer, _ in active:
            layer_state(layer).active = ()
            refresh_class(layer)
        for layer, name, _ in reversed(hidden):  # so that they come back in their order if some of them were deleted
            delattr(layer, name)
        for weight in thawed:
            weight.requires_grad_()
        yield
