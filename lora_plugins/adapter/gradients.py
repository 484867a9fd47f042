"""Which tensors require a gradient, with guards so that no gradient is lost silently.

A tensor that is frozen between a forward and its backward gets no gradient, and torch says nothing. Here it is guarded:
a backward that reaches it ends in an error. Only compiled autograd, which has no nodes to ask, is not guarded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from lora_plugins.errors import StateError

Guards = dict[int, RemovableHandle]
"""The guards of tensors that were frozen, by the tensor's `id`."""


def require_gradient(tensor: Tensor, required: bool, guards: Guards, name: str) -> None:
    """Freezes a leaf and notes its guard, or undoes both; does nothing where it is in the wanted state."""
    if tensor.requires_grad == required:
        return
    if id(tensor) in guards:
        guards.pop(id(tensor)).remove()
    if not required:
        # torch.utils.swap_tensors takes the calls of hooks along and leaves their table, which is put back so.
        tensor._backward_hooks = tensor._backward_hooks or None
        guards[id(tensor)] = tensor.register_hook(_RefuseLoss(name))  # type: ignore[no-untyped-call]
    tensor.requires_grad_(required)


def forget_freed(guards: Guards) -> None:
    """Drops the guards of tensors that are gone, such as those of a deleted adapter."""
    for key in [key for key, guard in guards.items() if guard.hooks_dict_ref() is None]:
        del guards[key]


@unserializable_hook  # a tensor that goes to another process needs none
@dataclass(frozen=True)
class _RefuseLoss:
    """Stops a backward that would lose a gradient, unless the user has unfrozen the tensor since."""

    name: str

    def __call__(self, _: Tensor) -> None:
        # The node that adds up gradients knows its tensor. Torch cannot move a tensor of a class of its own, such as a
        # quantized one, that a weak reference leads to.
        tensor: Tensor | None = getattr(torch._C._current_autograd_node(), "variable", None)
        if tensor is not None and not tensor.requires_grad:
            raise StateError(
                f"This backward would give no gradient to {self.name!r}, which was trained in the forward and is "
                "frozen now. Run the backward before changing which adapters act, or run the forward again after that. "
                "A model that keeps what it computes in eval mode, as LeViT does with its attention biases, forgets it "
                "in train()."
            )
