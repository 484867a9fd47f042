"""Figures of predictions."""

import pytest
import torch

from lora_plugins.tasks import ImageClassificationTask, SemanticSegmentationTask
from lora_plugins.tasks.reporting.figures import (
    as_pixels,
    confusion_figure,
    labels_figure,
    masks_figure,
    save_figure,
)

from ..conftest import tiny_segformer, tiny_vit


def test_pictures_have_their_true_and_predicted_class_as_titles():
    task = ImageClassificationTask(tiny_vit(), class_names=["cat", "dog", "owl"])
    true, predicted = torch.tensor([0, 1, task.ignore_index]), torch.tensor([0, 2, 1])
    axes = labels_figure(task, torch.rand(3, 3, 16, 16), true, predicted).axes
    assert [axis.get_title() for axis in axes] == ["cat\n→ cat", "dog\n→ owl", "(ignored)\n→ dog"]
    right, wrong, ignored = (axis.title.get_color() for axis in axes)
    assert right != wrong
    assert ignored == right  # no label, no mistake


def labels_of(names):
    task = ImageClassificationTask(tiny_vit(2), class_names=names)
    return labels_figure(task, torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), torch.tensor([0, 0]))


def masks_of(names, dtype=torch.long):
    task, masks = SemanticSegmentationTask(tiny_segformer(2), class_names=names), torch.eye(16).long()[None]
    return masks_figure(task, torch.rand(1, 3, 16, 16), masks.to(dtype), masks)


def confusion_of(names):
    return confusion_figure(torch.eye(2), names)


@pytest.mark.parametrize("draw", [labels_of, masks_of, confusion_of])
def test_names_of_classes_are_no_formulas(draw, tmp_path):
    """As matplotlib takes what is between two dollars for one."""
    save_figure(draw([r"$\frac$", "$5 or $10"]), tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.uint16], ids=str)
def test_the_key_of_masks_names_every_class(dtype):
    """As programs for annotations name the background."""
    (legend,) = masks_of(["_background_", "car"], dtype).legends
    assert [text.get_text() for text in legend.get_texts()] == ["_background_", "car"]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_images_of_any_number_of_channels_are_shown(channels, shown):
    image = torch.rand(channels, 4, 6)
    expected = (image[shown] * 255).round().byte().permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(as_pixels(image)), expected)
