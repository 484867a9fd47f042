"""Inputs that need not be saved, since what they were computed from is saved anyway.

`memory="low"` in the config: an input that is the output of a normalization or an activation is computed again in the
backward from what autograd saves for that operation itself, under private names. It costs one elementwise pass; nothing
is approximated. An input of another origin is saved as usual.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._autograd import Recompute
from lora_plugins.kernels._kernel import Kernel, missing_from_torch

Rule = Callable[[Any, Tensor], Recompute | None]


def _available() -> str:
    return missing_from_torch("_C._autograd._top_saved_tensors_default_hooks", "_C._autograd.SavedTensor.unpack_hook")


def _has_history(x: Tensor) -> bool:
    """Whether the graph behind the input stays alive until the backward, and may be read there."""
    return x.grad_fn is not None and not _is_checkpointed()


def _recomputation(x: Tensor) -> Recompute | None:
    """Returns what computes `x` again while the graph behind it is alive; None if `x` itself has to be saved."""
    return _of_node(x.grad_fn, x)


def _is_checkpointed() -> bool:
    """Whether gradient checkpointing saves nothing here anyway; what it computes again may be read once only."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return bool(hooks) and _is_of_checkpointing(hooks[0])


def _was_checkpointed(node: Any) -> bool:
    """Whether an operation ran where gradient checkpointing saved nothing."""
    saved = getattr(node, "_raw_saved_self", None) or node._raw_saved_input
    return saved.unpack_hook is not None and _is_of_checkpointing(saved.unpack_hook)


def _is_of_checkpointing(hook: Callable[..., Any]) -> bool:
    return hook.__module__ == torch.utils.checkpoint.__name__


def _of_node(node: Any, x: Tensor) -> Recompute | None:
    rule = _RULES.get(node.name())
    if rule is None or (rule is not _view and (_was_checkpointed(node) or _is_written(node, x))):
        return None
    return rule(node, x)


def _is_written(node: Any, x: Tensor) -> bool:
    """Whether anything but the operation itself, in place, has written into its output."""
    return x._version > 1 or (x._version == 1 and not _is_in_place(node))


def _is_in_place(node: Any) -> bool:
    """Whether an activation wrote into its input: then torch saves a copy of that, made for the purpose."""
    made_by = getattr(getattr(node, "_saved_self", None), "grad_fn", None)
    return made_by is not None and made_by.name() == "CloneBackward0" and made_by is not node.next_functions[0][0]


def _view(node: Any, x: Tensor) -> Recompute | None:
    recompute, shape = _of_node(node.next_functions[0][0], x), x.shape
    return None if recompute is None else lambda: recompute().reshape(shape)  # of another layout, perhaps


def _rule(compute: Callable[[Any], Tensor]) -> Rule:
    return lambda node, _: partial(compute, node)


def _layer_norm(node: Any, _: Tensor) -> Recompute | None:
    in_full = node._saved_result1.dtype in (torch.float32, torch.float64)  # a mean in half precision is rounded
    return partial(_normalized, node) if in_full else None


def _normalized(node: Any) -> Tensor:
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
    "NativeLayerNormBackward0": _layer_norm,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
}
"""By name of an operation in the graph; each of them has one output that can be differentiated."""


KERNELS = (Kernel("recompute", "recomputation", _available, _has_history, _recomputation),)
