"""Tensors laid out in memory as others are."""

import torch
from torch import Tensor


def laid_out_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """Returns a tensor in the memory format of another one of its shape, down to the steps of dimensions of 1.

    torch takes formats from those steps as well, as of kernels of one position, and calls such tensors contiguous in
    more than one format; results of its elementwise operations have steps of their own there.
    """
    if tensor.stride() == reference.stride():
        return tensor
    dense = torch.empty_like(reference, device="meta").stride()
    return tensor if tensor.stride() == dense else tensor.new_empty_strided(tensor.shape, dense).copy_(tensor)
