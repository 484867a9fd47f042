"""Versions of tensors, by which autograd finds out that what it kept was changed."""

from torch import Tensor


def mark_changed(tensor: Tensor) -> None:
    """Lets a backward through a forward that has used the tensor end in torch's own error.

    Putting another storage behind a tensor does not count as a change of it, and so would give the gradients of another
    function. Writing into an empty part of it does, and writes nothing.
    """
    if not tensor.is_inference():
        tensor.detach().unsqueeze(0)[:0].zero_()
