"""How many images a step takes."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks.autoconfig.step_memory import fitting_batch, free_bytes, kept_bytes

VIT = {"source": "timm", "name": "test_vit", "num_classes": 3}
SEGFORMER = {
    "source": "transformers",
    "name": "segformer",
    "num_classes": 3,
    "options": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}


def test_larger_images_keep_more():
    small, large = (
        kept_bytes("SemanticSegmentationTask", SEGFORMER, (side, side), lora={"r": 2}) for side in (64, 128)
    )
    assert 3 * small < large < 5 * small


def test_a_step_keeps_what_the_measure_says():
    """A count of its own: the inputs of all layers of a ViT alone are less, and all activations together more."""
    per_image = kept_bytes("ImageClassificationTask", VIT, None, lora={"r": 2})
    assert 0.5 * 2**20 < per_image < 50 * 2**20


def test_images_that_the_network_does_not_take():
    with pytest.raises(ConfigError, match=r"test_vit cannot be trained on images of 50x50: .*--image-size"):
        kept_bytes("ImageClassificationTask", VIT, (50, 50), lora={"r": 2})


def test_images_of_which_nothing_is_left():
    model = VIT | {"name": "test_efficientnet"}
    with pytest.raises(ConfigError, match=r"^The images are too small for test_efficientnet: .*--image-size"):
        kept_bytes("ImageClassificationTask", model, (16, 16), lora={"r": 2})


@pytest.mark.parametrize(("free", "batch"), [(None, 32), (6400, 32), (6399, 16), (500, 2), (300, 1), (100, 1)])
def test_the_batch_is_halved_until_it_fits(free, batch):
    assert fitting_batch(32, 100, free) == batch


def test_one_image_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"takes 3 MiB for one image, and 2 MiB are free.*--image-size"):
        fitting_batch(32, 3 * 2**20, 2 * 2**20)


def test_a_cpu_has_memory():
    free = free_bytes("cpu")
    assert free is None or free > torch.zeros(1).nbytes
