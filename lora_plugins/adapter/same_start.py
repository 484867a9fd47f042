"""Checks, where an init changes the base, that the model starts as it was: rounding or a variant could change it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_plugins.errors import TargetError, listing
from lora_plugins.inplace import StoredWeight, full_name, own_tensor, variant_delta
from lora_plugins.plan import Plan
from lora_plugins.plugins import InitPlugin, PlannedLayer
from lora_plugins.utils import in_float64

_LOST = 0.01
"""The share of a weight that may be lost: several times what rounding to bfloat16 loses of any weight."""

_LARGEST_STORED = 4.0
"""How many times as large a weight that is stored in fewer bytes may become; storing it loses a tenth of it."""


def check_rounded(
    model: nn.Module, plan: Plan, changed: Mapping[str, Tensor], stored: Mapping[str, StoredWeight]
) -> None:
    """Checks that the weights which an init puts in place of others can be held in their types.

    The changed weight and the first update add up to the former weight, so that the model starts as it was. Where both
    are many times as large as their sum, rounding them leaves noise of it.

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


def check_first_update(
    init: InitPlugin, layer: PlannedLayer, weight: Tensor, A: Tensor, B: Tensor, own: Mapping[str, Tensor]
) -> None:
    """Checks that the variant of a layer first adds what an init has taken out of its base.

    `weight` is (out, in), as the init left it, A is (r, in) and B (out, r); `own` has the first values of the variant's
    own tensors.

    Raises:
        TargetError: If that is another matrix than `scaling * B @ A`, by more than rounding.
    """
    assert layer.variant is not None
    taken, added = layer.scaling * B @ A, variant_delta(layer, weight, A, B, own)
    if not bool((added - taken).norm() <= _LOST * (weight + taken).norm()):
        raise TargetError(
            f"The init {init.name!r} takes scaling · B·A out of the base, and the first update of the variant "
            f"{layer.variant.name!r} is another matrix at {layer.name!r}: the model would not start as it was. Choose "
            "an init that leaves the base as it is, such as 'kaiming'."
        )


def _largest(dtype: torch.dtype, is_stored: bool) -> float:
    """Returns how many times as large a weight may become; rounding loses about a fourth of eps."""
    return _LARGEST_STORED if is_stored else _LOST / (torch.finfo(dtype).eps / 4)


def _growth(former: Tensor, new: Tensor) -> float:
    """Returns how many times as large a weight becomes; one of zeros has nothing to lose."""
    size = float(in_float64(former.detach()).norm())
    return float(in_float64(new).norm()) / size if size else 0.0
