"""Inputs that need not be kept, since what they were computed from is kept anyway.

`memory="low"` in the config: an input that is the output of a normalization or an activation is computed again in the
backward from what autograd keeps for that operation itself. It costs one elementwise pass; nothing is approximated. An
input of another origin is kept as ever.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F

Recompute = Callable[[], Tensor]
Rule = Callable[[Any, Tensor], Recompute | None]


def recomputation(x: Tensor) -> Recompute | None:
    """Returns what computes `x` again while the graph behind it is alive; None if `x` itself has to be kept."""
    if x.grad_fn is None or x.output_nr or _is_checkpointed():
        return None
    return _again(x.grad_fn, x)


def _is_checkpointed() -> bool:
    """Whether gradient checkpointing keeps nothing here anyway; what it computes again may be read once only."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return bool(hooks) and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _again(node: Any, x: Tensor) -> Recompute | None:
    rule = _RULES.get(node.name())
    return None if rule is None else rule(node, x)


def _view(node: Any, x: Tensor) -> Recompute | None:
    parent, output = node.next_functions[0]
    if parent is None or output:
        return None
    again, shape = _again(parent, x), x.shape
    return None if again is None else lambda: again().view(shape)


def _rule(compute: Callable[[Any], Tensor]) -> Rule:
    return lambda node, _: partial(compute, node)


def _layer_norm(node: Any) -> Tensor:
    normalized: Tensor = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
    if node._saved_weight is not None:
        normalized.mul_(node._saved_weight)
    return normalized if node._saved_bias is None else normalized.add_(node._saved_bias)


_RULES: Mapping[str, Rule] = {
    "GeluBackward0": _rule(lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate)),
    "SiluBackward0": _rule(lambda node: F.silu(node._saved_self)),
    "HardswishBackward0": _rule(lambda node: F.hardswish(node._saved_self)),
    "HardtanhBackward0": _rule(lambda node: F.hardtanh(node._saved_self, node._saved_min_val, node._saved_max_val)),
    "LeakyReluBackward0": _rule(lambda node: F.leaky_relu(node._saved_self, node._saved_negative_slope)),
    "NativeLayerNormBackward0": _rule(_layer_norm),
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
}
