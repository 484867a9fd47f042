"""The state of torch's `SWALR`, which in torch 2.8 holds a function; torch 2.13 leaves it out.

`torch.load(weights_only=True)` refuses functions. `SWALR` has this one from its constructor, before a state is put into
it. To be deleted when the oldest torch leaves it out by itself.
"""

from collections.abc import Mapping
from inspect import isfunction
from typing import Any

from torch.optim.swa_utils import SWALR

_MODULE = SWALR.__module__
_KEY = "scheduler_state"  # of StochasticWeightAveraging


def without_functions(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint whose states of schedulers hold no function of `SWALR`."""
    plain = dict(checkpoint)
    if "lr_schedulers" in plain:
        plain["lr_schedulers"] = [_plain(state) for state in plain["lr_schedulers"]]
    if "callbacks" in plain:
        plain["callbacks"] = {name: _plain_callback(state) for name, state in plain["callbacks"].items()}
    return plain


def _plain_callback(state: Any) -> Any:
    return {**state, _KEY: _plain(state[_KEY])} if isinstance(state, dict) and _KEY in state else state


def _plain(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {key: value for key, value in state.items() if not (isfunction(value) and value.__module__ == _MODULE)}
