"""A batch, and its labels checked.

A sample is a dict: `image`, float in [0, 1], (channels, H, W); `target`, a class index or an (H, W) mask of class
indices; `name`, its file or scene, for error messages. Tasks also take plain (image, target) pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from lora_plugins.tasks.errors import DataError


@dataclass(frozen=True)
class Batch:
    """A batch of images with their targets and names.

    Attributes:
        images: (N, channels, H, W), float in [0, 1].
        targets: (N,) class indices or (N, H, W) masks; None if there are none (prediction).
        names: Where each image comes from; None if the data set does not say.
    """

    images: Tensor
    targets: Tensor | None
    names: Sequence[str] | None

    @classmethod
    def read(cls, batch: Any) -> Self:
        """Reads what a data loader gives: a dict as above, a tensor, or an (image, target) pair.

        Raises:
            DataError: For anything else.
        """
        match batch:
            case Tensor():
                return cls(batch, None, None)
            case {"image": Tensor() as images}:
                return cls(images, batch.get("target"), batch.get("name"))
            case [Tensor() as images, Tensor() as targets]:
                return cls(images, targets, None)
        shape = f" with the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise DataError(
            f"The data loader gave a {type(batch).__name__}{shape}; a task needs a dict with `image` and `target`, a "
            "pair (image, target), or a tensor of images."
        )


def check_targets(batch: Batch, num_classes: int, ignore_index: int) -> Tensor:
    """Checks that every target of a batch is in [0, num_classes) or equal to `ignore_index`, and returns the targets.

    Raises:
        DataError: If there are no targets, or with each label out of range and the file that holds it.
    """
    if batch.targets is None:
        raise DataError("The batch has images but no targets; only prediction works without.")
    wrong = (batch.targets != ignore_index) & ((batch.targets < 0) | (batch.targets >= num_classes))
    if not wrong.any():
        return batch.targets
    labels = sorted(set(batch.targets[wrong].tolist()))
    rows = wrong.reshape(len(wrong), -1).any(1)
    names = batch.names or [f"sample {i} of the batch" for i in range(len(rows))]
    where = ", ".join(name for name, bad in zip(names, rows.tolist(), strict=True) if bad)
    raise DataError(
        f"Label {', '.join(map(str, labels))} in {where}: labels are 0 to {num_classes - 1}, or {ignore_index} for "
        "what loss and metrics should ignore (`ignore_index` of the task)."
    )
