"""A card where there is none: meta tensors, and a watch over every call of torch that one would have to wait for.

Meta tensors have a device, a shape and a type and no values, so whatever asks for a value fails by itself: `item`,
`bool`, `nonzero`, an index of booleans. What the watch adds are the ways to wait that they let pass.
"""

from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from lora_plugins.kernels import _eager

CARD = torch.device("meta")

MADE_OF_HOST_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor)


class WaitError(AssertionError):
    """Something waited for the card, or was made beside it."""


class Watch(TorchFunctionMode):
    """Refuses what goes from one device to another, mixes them, or makes tensors beside the card.

    A number drawn on the host, such as the seed of a mask, is none of these. Kernels, which leave meta tensors to
    ordinary operations otherwise, run as they do on a card.
    """

    def __init__(self):
        super().__init__()
        self._patches = (
            patch.object(_eager, "is_eager", lambda x: True),
            patch.object(torch, "Generator", CardGenerator),
        )

    def __enter__(self):
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for each in self._patches:
            each.stop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = resolve_name(func) or repr(func)
        if isinstance(kwargs.get("generator"), CardGenerator):
            kwargs["generator"] = None
        result = func(*args, **kwargs)
        if "__get__" in name or "__set__" in name:
            return result
        given = {tensor.device for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor) and tensor.ndim}
        # Of what has no elements nothing is copied; the checkpoint of torch 2.8 makes such a tensor on the CPU.
        full = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor) and tensor.ndim]
        made = {tensor.device for tensor in full if tensor.numel()}
        if len(given | made) > 1:
            raise WaitError(f"{name} goes between {' and '.join(sorted(map(str, given | made)))}")
        if made - {CARD}:
            raise WaitError(f"{name} makes a tensor on {made.pop()}")
        if func in MADE_OF_HOST_DATA and any(leaf.device == CARD for leaf in tree_leaves(result)):
            raise WaitError(f"{name} copies data of the host")
        return result


class CardGenerator(torch.Generator):
    """Stands for a generator of the card, of which there can be none without one."""

    def __new__(cls, device):
        assert torch.device(device) == CARD, "a generator of the host draws on the host"
        return super().__new__(cls)

    device = CARD
