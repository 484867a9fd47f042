"""Products over the channels of images, in the memory format that the images have.

Convolutions with few channels are slow, and what a low-rank update needs of them are small matrix products. Images are
`(batch, channels, *positions)`, either contiguous or with their channels last.

Gradients have the format in memory that those of torch's own layers have: operations take it from each other, and
torch's normalizations (2.13, on a CPU) are silently wrong for some pairs of formats of input and gradient.
"""

import torch
from torch import Tensor

from lora_plugins.kernels.conv_geometry import pointwise
from lora_plugins.kernels.matmul import transposed_product


def channels_last(image: Tensor) -> bool:
    """Whether channels are innermost in memory, as torch's convolutions see it, and would not be so if contiguous.

    After a view, a dimension of 1, such as a batch of one image, can have any stride. If that is less than the size of
    what is inside of it, torch takes the image for contiguous.
    """
    if image.is_contiguous():
        return False
    inner = image.movedim(1, -1)
    steps = inner.stride()
    whole = zip(steps, steps[1:], inner.shape[1:], strict=False)
    return inner.is_contiguous() and all(outer >= step * size for outer, step, size in whole)


def as_rows(tensor: Tensor, axis: int = 1) -> Tensor:
    """Returns `(batch * positions, channels)`; a view where the channels, at an axis, are innermost in memory."""
    innermost = tensor if axis == -1 else tensor.movedim(axis, -1)
    return innermost.reshape(-1, tensor.shape[axis])


def gradient_of_image(image: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradient of an image as torch's convolutions lay it out: with its channels last, or contiguous."""
    return gradient.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last(image) else gradient.contiguous()


def gradient_of_bias(gradient: Tensor) -> Tensor:
    """Returns the gradient of what is added to the channels of an image, from that of the image."""
    return gradient.transpose(0, 1).flatten(1).sum(1)


def gradient_of_rows(steps: tuple[int, ...], gradient: Tensor) -> Tensor:
    """Returns the gradient of rows as torch's product lays it out: by columns where they were so, or contiguous.

    Args:
        steps: Those that the rows had in memory when they were multiplied, before hooks of saved tensors.
        gradient: It is contiguous.
    """
    if steps != (1, len(gradient)):
        return gradient
    return gradient.new_empty(gradient.shape[::-1]).T.copy_(gradient)  # of one row or column, too


def mix_channels(matrix: Tensor, image: Tensor, spare: Tensor | None = None) -> Tensor:
    """Returns `matrix` applied to the channels at each position: `(batch, matrix.shape[0], *positions)`.

    Args:
        matrix: `(any, channels)`.
        image: `(batch, channels, *positions)`.
        spare: Like the result; it may be written into.
    """
    if channels_last(image):
        dimensions = image.ndim - 2
        return pointwise(dimensions).convolve(image, matrix.reshape(*matrix.shape, *[1] * dimensions))
    out = spare.flatten(2) if spare is not None and spare.is_contiguous() else None
    mixed = torch.bmm(_for_each(image, matrix), image.flatten(2), out=out)  # matmul would copy the image
    return mixed.view(image.shape[0], matrix.shape[0], *image.shape[2:])


def add_mixed_channels(target: Tensor, matrix: Tensor, image: Tensor, alpha: float) -> None:
    """Adds `alpha * mix_channels(matrix, image)` to a target, in one operation where formats and types agree."""
    one_type = target.dtype == image.dtype
    if one_type and channels_last(target) and channels_last(image):
        as_rows(target).addmm_(as_rows(image), matrix.T, alpha=alpha)
    elif one_type and target.is_contiguous():
        target.flatten(2).baddbmm_(_for_each(image, matrix), image.flatten(2), alpha=alpha)
    else:
        target.add_(mix_channels(matrix, image), alpha=alpha)


def channel_products(few: Tensor, many: Tensor) -> Tensor:
    """Returns the products of two images' channels, summed over batch and positions: `(few, many)` channels."""
    if channels_last(few) and channels_last(many):
        return transposed_product(as_rows(few), as_rows(many))
    return torch.bmm(few.flatten(2), many.flatten(2).mT).sum(0)


def _for_each(image: Tensor, matrix: Tensor) -> Tensor:
    return matrix.expand(image.shape[0], *matrix.shape)
