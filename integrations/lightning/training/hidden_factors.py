"""Calls `configure_optimizers` again where it fails on A and B, as code with a table of all parameters does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import LoraError
from lora_plugins.inplace import AdapterTensors, named_parameters
from lora_plugins.integrations.lightning.module import adapted_weights
from lora_plugins.utils import ending

_LONGEST = 300
"""Characters of an error that the warning cites; some list all parameters."""


def retry_without_factors(module: nn.Module, configure: Callable[[], Any]) -> Any:
    """Returns what `configure` does; if it raises an error, what it returns without A and B, with a warning."""
    try:
        return configure()
    except LoraError:
        raise
    except Exception as error:
        results = []
        with suppress(Exception), _without_factors(module):
            results.append(configure())
        if not results:
            raise
        said = f"{type(error).__name__}: {error}"[:_LONGEST]
        rank_zero_warn(
            f"configure_optimizers failed, and was called once more as if there were no A and B. The error was: {said}"
        )
        return results[0]


@contextmanager
def _without_factors(module: nn.Module) -> Iterator[None]:
    """Hides A and B from whoever lists the parameters of a module, and lets adapted layers give their own weights.

    Those require a gradient meanwhile, as they did before they were adapted: they tell where A and B belong. An adapted
    layer without its A and B answers with its parameter, by `nn.Module.__getattr__`.
    """
    containers = [each for each in module.modules() if isinstance(each, AdapterTensors)]
    hidden = [(container, name, container[name]) for container in containers for name in container]
    owned = named_parameters(module, aliases=True)
    weights = [owned[name] for name in adapted_weights(module) if name in owned]
    thawed = [weight for weight in weights if weight.is_floating_point() and not weight.requires_grad]

    def put_back() -> None:
        for container, name, factor in hidden:
            container[name] = factor
        for weight in thawed:
            weight.requires_grad_(False)

    with ending(put_back):
        for container, name, _ in hidden:
            del container[name]
        for weight in thawed:
            weight.requires_grad_()
        yield
