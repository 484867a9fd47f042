"""Figures of predictions."""

import torch

from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.reporting.figures import labels_figure

from ..conftest import tiny_vit


def test_pictures_have_their_true_and_predicted_class_as_titles():
    task = ImageClassificationTask(tiny_vit(), class_names=["cat", "dog", "owl"])
    true, predicted = torch.tensor([0, 1, task.ignore_index]), torch.tensor([0, 2, 1])
    axes = labels_figure(task, torch.rand(3, 3, 16, 16), true, predicted).axes
    assert [axis.get_title() for axis in axes] == ["cat\n→ cat", "dog\n→ owl", "(ignored)\n→ dog"]
    right, wrong, ignored = (axis.title.get_color() for axis in axes)
    assert right != wrong
    assert ignored == right  # no label, no mistake
