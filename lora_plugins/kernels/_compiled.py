"""When compilers get an operator that runs the eager kernels, in place of ordinary operations.

`torch.compile` has no better way on a CPU: products and convolutions are calls of a library there as well, the small
products are added to the output, and autograd of the effective weight forms the gradient of the whole weight. An
operator is a function of its tensors alone, the seed of its dropout masks among them, so that compilers may move it or
run it again.
"""

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling, is_exporting

from lora_plugins.kernels._autograd import rounded
from lora_plugins.kernels._eager import types_agree
from lora_plugins.kernels._path import may_form_effective_weight
from lora_plugins.kernels._switches import active_kernels
from lora_plugins.kernels.dropout import SEEDS
from lora_plugins.kernels.update import Update
from lora_plugins.utils import autocast_dtype, transforms_are_active

_PLAIN = (Tensor, nn.Parameter)


def takes_operator(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> bool:
    """Whether a compiler is at work, and takes the operator of an operation.

    Not on a GPU, where it was not measured; not where a program is exported, to run without this package.

    Switching off the kernels of an operation switches off the operator.
    """
    tensors = (x, weight, bias, update.A, update.B)
    return (
        is_dynamo_compiling()
        and _may_take(operation)
        and all(each is None or (type(each) in _PLAIN and each.is_cpu) for each in tensors)
        and types_agree(x, weight, bias)
        and not transforms_are_active()
    )


def operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Returns what an operator takes: the tensors as autocast rounds them, and the seed of its dropout masks.

    Autocast leaves a wide weight and its update alone, which are added in full where there is no dropout.
    """
    seed, dtype = torch.randint(SEEDS, (), device="cpu") if update.dropout else None, autocast_dtype(x)
    if dtype is None:
        return x, weight, bias, update.A, update.B, seed
    in_full_weight = may_form_effective_weight(weight, update.dropout)
    return *rounded(dtype, x, weight, bias, update, in_full_weight=in_full_weight), seed


def _may_take(operation: str) -> bool:
    return not is_exporting() and len(active_kernels(operation)) > 0


# Compilers cannot trace how kernels are found, and that of torch 2.8 takes every program for exported. This is all that
# `torch.compiler.assume_constant_result` does, which imports the compiler, for longer than a second. In a torch that
# does not know the mark, graphs would break here.
_may_take._dynamo_marked_constant = True  # type: ignore[attr-defined]
