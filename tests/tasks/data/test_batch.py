"""What is checked of a batch."""

import pytest
import torch

from lora_plugins.tasks import DataError
from lora_plugins.tasks.data import Batch, check_targets


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)], ids=["labels", "masks"])
def test_only_what_holds_a_wrong_label_is_named(shape):
    targets = torch.zeros(shape, dtype=torch.long)
    targets[0], targets.view(3, -1)[1, 0] = 255, 7
    with pytest.raises(DataError, match=r"^Label 7 in b\.png: labels are 0 to 2, or 255 "):
        check_targets(Batch(torch.zeros(3, 3, 2, 2), targets, ["a.png", "b.png", "c.png"]), 3, 255)


@pytest.mark.parametrize(
    ("batch", "kind"), [([1, 2], "list"), ({"pixels": 1}, r"dict with the keys \['pixels'\]")], ids=["list", "dict"]
)
def test_what_is_no_batch_is_described(batch, kind):
    with pytest.raises(DataError, match=rf"^The data loader gave a {kind}; a task needs a dict with `image` and"):
        Batch.read(batch)


def test_images_alone_have_no_targets_to_check():
    with pytest.raises(DataError, match="only prediction works without"):
        check_targets(Batch.read(torch.zeros(3, 3, 2, 2)), 3, 255)
