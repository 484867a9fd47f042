"""Images of a size that a network refuses are told as that."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.inference import label_probabilities

from ..conftest import tiny_vit


def test_another_number_of_channels_is_told_as_that(trainer):
    """Neither as a size, nor, by commands that predict, as an error of torch."""
    task = ImageClassificationTask(replace(tiny_vit(in_chans=4), mean=(0.5,) * 4, std=(0.5,) * 4))
    loader = DataLoader(TensorDataset(torch.rand(2, 3, 16, 16), torch.tensor([0, 1])), batch_size=2)
    for judge in (lambda: trainer().validate(task, loader), lambda: label_probabilities(task, torch.rand(3, 16, 16))):
        with pytest.raises(ConfigError, match=r"takes images of 4 channels, .* and these have 3\."):
            judge()


def test_images_of_8_bits_are_refused(trainer):
    """They would be normalized as if white were 1, and train without an error."""
    loader = DataLoader(TensorDataset(torch.ones(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1])))
    with pytest.raises(ConfigError, match=r"^Images are torch.uint8; .* from 0 to 1. Divide those of 8 bits by 255"):
        trainer().validate(ImageClassificationTask(tiny_vit()), loader)


@pytest.mark.parametrize("count", [1, 2])
def test_a_size_that_the_network_refuses_is_told_as_that(trainer, count):
    """timm asserts, torch raises: it is a size that the user chose, of the images or, for batch norm, of the batch."""
    loader = DataLoader(TensorDataset(torch.rand(2, 3, 20, 24), torch.tensor([0, 1])), batch_size=count)
    said = r"another data.init_args.image_size [^,]+" + r", a larger data.init_args.batch_size" * (count == 1)
    with pytest.raises(ConfigError, match=rf"fails on images of 20x24: .*choose {said}[^,]*, or another model"):
        trainer().validate(ImageClassificationTask(tiny_vit()), loader)
