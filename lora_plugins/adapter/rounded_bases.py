"""Checks that a base changed by an init keeps its precision: rounding errors grow with the size of the values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_plugins.errors import TargetError, listing
from lora_plugins.inplace import StoredWeight, full_name, own_tensor
from lora_plugins.plan import Plan
from lora_plugins.utils import in_float64

_LOST = 0.01
"""The share of a weight that may be lost: several times what rounding to bfloat16 loses of any weight."""

_LARGEST_STORED = 4.0
"""How many times as large a weight may become that is stored in fewer bytes, and loses a tenth of itself by that."""


def check_rounded(
    model: nn.Module, plan: Plan, changed: Mapping[str, Tensor], stored: Mapping[str, StoredWeight]
) -> None:
    """Checks that the weights which an init puts in place of others can be held in their types.

    The changed weight and the first update add up to the former weight, so that the model starts as it was. Where both
    are many times as large as their sum, rounding them leaves noise of it.

    Args:
        model: The model, with the former weights.
        plan: What is adapted.
        changed: The new weights by full name.
        stored: Those that are stored in fewer bytes, likewise.

    Raises:
        TargetError: If some would lose too much, naming them.
    """
    if not plan.init.changes_base:
        return
    started = {full_name(layer.name, slot.tensor) for layer, slot, _ in plan.slots()}
    values = dict(changed) | {name: weight.dense() for name, weight in stored.items() if name in started}
    grown = {name: _growth(own_tensor(model, name), value) for name, value in values.items()}
    lost = [name for name, value in values.items() if grown[name] > _largest(value.dtype, name in stored)]
    if lost:
        raise TargetError(
            f"The init {plan.init.name!r} makes {listing(lost, 3)} up to {max(grown[name] for name in lost):.3g} times "
            "as large, which their types cannot hold exactly enough: the model would not start as it was. Load the "
            "base in float32, leave out quantize, or let the first update be smaller: by alpha, by init_options, or, "
            "where the init learns from gradients, by a loss that is averaged."
        )


def _largest(dtype: torch.dtype, is_stored: bool) -> float:
    """Returns how many times as large a weight may become; rounding loses about a fourth of eps."""
    return _LARGEST_STORED if is_stored else _LOST / (torch.finfo(dtype).eps / 4)


def _growth(former: Tensor, new: Tensor) -> float:
    """Returns how many times as large a weight becomes; one of zeros has nothing to lose."""
    size = float(in_float64(former.detach()).norm())
    return float(in_float64(new).norm()) / size if size else 0.0
