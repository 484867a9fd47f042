"""Probabilities by sliding window and with mirror images."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks import SemanticSegmentationTask
from lora_plugins.tasks.inference import label_probabilities, mask_labels, mask_probabilities, most_probable

from ..conftest import unet


class TestMasks:
    def test_one_window_over_all_is_the_network_itself(self, fitted):
        task, _ = fitted["masks"]
        image = torch.rand(3, 64, 64)
        found = mask_probabilities(task, image, window=(64, 64))
        torch.testing.assert_close(found, task(image[None]).softmax(1)[0].detach())

    def test_a_window_that_the_network_does_not_take_is_named(self):
        task = SemanticSegmentationTask(unet(decoder="UnetPlusPlus")).eval()
        with pytest.raises(ConfigError, match=r"UnetPlusPlus takes no window of 30x32: .*divisible by 8\..* Choose"):
            mask_probabilities(task, torch.rand(3, 64, 64), window=(30, 32))

    def test_images_may_be_where_the_task_is(self, fitted, device):
        """With --device; the answer is on the CPU."""
        task, image = fitted["masks"][0], torch.rand(3, 80, 96)
        expected = mask_probabilities(task, image, window=(64, 64))
        task.to(device)
        found = mask_probabilities(task, image.to(device), window=(64, 64))
        task.cpu()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    def test_flips_make_the_answer_a_mirror_of_that_of_the_mirror_image(self, fitted):
        task, _ = fitted["masks"]
        image = torch.rand(3, 64, 96)
        one, two = (mask_probabilities(task, i, window=(64, 64), flips=True) for i in (image, image.flip(-1)))
        torch.testing.assert_close(one, two.flip(-1), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("window", [None, (64, 64)], ids=["whole", "windows"])
    @pytest.mark.parametrize("size", [(80, 96), (40, 30)], ids=["larger", "smaller"])
    def test_labels_are_the_most_probable_classes_of_8_bit_images_too(self, fitted, window, size):
        task, _ = fitted["masks"]
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        expected = mask_probabilities(task, image.float() / 255, window=window, flips=True)
        assert torch.equal(mask_probabilities(task, image, window=window, flips=True), expected)
        labels = mask_labels(task, image, window=window, flips=True)
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, expected.argmax(0))


def test_the_first_of_equal_probabilities_counts():
    probabilities = torch.tensor([0.2, 0.4, 0.4])[:, None, None]
    assert most_probable(probabilities, (2, 3)).tolist() == [[1] * 3] * 2


def test_labels_of_8_bit_images(fitted):
    task, _ = fitted["labels"]
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    assert torch.equal(label_probabilities(task, image), label_probabilities(task, image.float() / 255))
