"""Tells what is changed after the results of a run were made, as by `on_fit_end` of its module."""

from collections.abc import Mapping

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lora_plugins.errors import counted, listing
from lora_plugins.integrations.lightning.module import checksums
from lora_plugins.integrations.lightning.training.frozen_base import changed


class LateChanges:
    """What a module holds when it is saved and merged: its tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._sums = tensors, checksums(tensors)
        self._kinds = {name: _kind(tensor) for name, tensor in tensors.items()}

    def tell(self) -> None:
        """Names what has changed since, except for what was converted to another type, or freed."""
        same = {name: tensor for name, tensor in self._tensors.items() if _kind(tensor) == self._kinds[name]}
        if late := changed(self._sums, same):
            rank_zero_warn(
                f"{counted(len(late), 'tensor was', 'tensors were')} changed after the adapter was saved and merged, "
                f"and what was saved has their values of before: {listing(late)}. on_fit_end of the module, or of a "
                "callback behind the LoraCallback, does that, as to take the averages of a schedule-free optimizer. "
                "Do it in on_train_end, which comes before."
            )


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
