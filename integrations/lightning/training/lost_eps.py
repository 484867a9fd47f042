"""Tensors in float16 that an optimizer has divided by zero, since its eps is no number of that type."""

from collections.abc import Iterable, Mapping

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.module import local
from lora_plugins.utils import are_finite


def warn_of_lost_eps(optimizers: Iterable[Optimizer], trained: Mapping[str, nn.Parameter]) -> bool:
    """Names trained tensors that are not finite after steps whose eps is 0 in their type; returns whether any is.

    Gradients below 2e-4 have a square of 0 in float16, and AdamW divides by its root plus eps.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    lost = {id(p): (optimizer, group) for optimizer, group in groups for p in group["params"] if _is_lost(group, p)}
    wrong = [name for name, p in trained.items() if id(p) in lost and not are_finite(local(p))]
    if wrong:
        optimizer, group = lost[id(trained[wrong[0]])]
        rank_zero_warn(
            f"{listing(wrong, 3)} became NaN or infinite. The likely cause: eps={group['eps']:g} of "
            f"{type(optimizer).__name__} is 0 in float16, in which small gradients have a square of 0 too, and the one "
            "is divided by the other. Train with precision='16-mixed' or 'bf16-true', or set eps=1e-4 in the optimizer."
        )
    return bool(wrong)


def _is_lost(group: Mapping[str, object], parameter: Tensor) -> bool:
    eps = group.get("eps")
    return (
        parameter.dtype is torch.float16 and isinstance(eps, float) and eps > 0 and not torch.tensor(eps).half().any()
    )
