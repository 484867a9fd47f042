"""Probabilities by sliding window and with mirror images."""

import pytest
import torch
from torchvision import tv_tensors

from lora_plugins import ConfigError
from lora_plugins.tasks import SemanticSegmentationTask
from lora_plugins.tasks.data import image_transform
from lora_plugins.tasks.inference import label_probabilities, mask_labels, mask_probabilities, most_probable, resized

from ..conftest import unet


class TestMasks:
    def test_one_window_over_all_is_the_network_itself(self, fitted):
        task, _ = fitted["masks"]
        image = torch.rand(3, 64, 64)
        found = mask_probabilities(task, image, window=(64, 64))
        torch.testing.assert_close(found, task(image[None]).softmax(1)[0].detach())

    @pytest.mark.parametrize(
        ("overlap", "starts"),
        [(0.0, [0, 64, 96]), (0.25, [0, 48, 96]), (0.5, [0, 32, 64, 96])],
        ids=["none", "a quarter", "half"],
    )
    @pytest.mark.parametrize("size", [(64, 160), (160, 64)], ids=["wide", "high"])
    def test_windows_are_averaged_where_they_overlap(self, fitted, size, overlap, starts):
        task, _ = fitted["masks"]
        image, total, count = torch.rand(3, *size), torch.zeros(4, *size), torch.zeros(size)
        for start in starts:
            window = (
                (..., slice(start, start + 64)) if size[1] > size[0] else (..., slice(start, start + 64), slice(64))
            )
            total[window] += task(image[window][None]).softmax(1)[0].detach()
            count[window] += 1
        found = mask_probabilities(task, image, window=(64, 64), overlap=overlap)
        torch.testing.assert_close(found, total / count)

    def test_an_image_in_a_larger_window_goes_on_as_its_edges_are(self, fitted):
        task, _ = fitted["masks"]
        image = torch.rand(3, 40, 30)
        larger = image[:, torch.arange(64).clamp(max=39)][:, :, torch.arange(64).clamp(max=29)]
        found = mask_probabilities(task, image, window=(64, 64))
        torch.testing.assert_close(found, task(larger[None]).softmax(1)[0, :, :40, :30].detach())

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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(16, 20), (60, 70)], ids=["smaller", "larger"])
def test_images_are_resized_as_those_of_data_are(size, interpolation):
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    expected = image_transform(size, interpolation=interpolation)(tv_tensors.Image(image))
    assert torch.equal(resized(image, size, interpolation), expected)


def test_the_first_of_equal_probabilities_counts():
    probabilities = torch.tensor([0.2, 0.4, 0.4])[:, None, None]
    assert most_probable(probabilities, (2, 3)).tolist() == [[1] * 3] * 2


def test_labels_of_8_bit_images(fitted):
    task, _ = fitted["labels"]
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    assert torch.equal(label_probabilities(task, image), label_probabilities(task, image.float() / 255))
