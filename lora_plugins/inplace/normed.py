"""Weight norm: where a layer keeps the length and the direction that it computes a weight from."""

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


def length_and_direction(layer: nn.Module, weight: str) -> tuple[str, str, int] | None:
    """Returns the names of the two parameters, and the dimension whose entries have lengths of their own.

    None is for a weight that weight norm does not compute, or not it alone.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == weight:
            return f"{weight}_g", f"{weight}_v", hook.dim
    chain = getattr(layer._modules.get("parametrizations"), weight, None)
    if isinstance(chain, nn.ModuleList) and len(chain) == 1 and isinstance(chain[0], _WeightNorm):
        return f"parametrizations.{weight}.original0", f"parametrizations.{weight}.original1", chain[0].dim
    return None
