"""Probabilities by sliding window and with mirror images."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks import SemanticSegmentationTask
from lora_plugins.tasks.inference import mask_probabilities

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
