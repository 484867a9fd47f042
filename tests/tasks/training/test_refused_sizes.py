"""Images of a size that a network refuses are told as that."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import ImageClassificationTask

from ..conftest import tiny_vit


@pytest.mark.parametrize("count", [1, 2])
def test_a_size_that_the_network_refuses_is_told_as_that(trainer, count):
    """timm asserts, torch raises: it is a size that the user chose, of the images or, for batch norm, of the batch."""
    loader = DataLoader(TensorDataset(torch.rand(2, 3, 20, 24), torch.tensor([0, 1])), batch_size=count)
    said = r"another data.init_args.image_size [^,]+" + r", a larger data.init_args.batch_size" * (count == 1)
    with pytest.raises(ConfigError, match=rf"fails on images of 20x24: .*choose {said}[^,]*, or another model"):
        trainer().validate(ImageClassificationTask(tiny_vit()), loader)
