"""The samples that a report shows."""

import torch
from torch.utils.data import DataLoader

from lora_plugins.tasks import SemanticSegmentationTask
from lora_plugins.tasks.reporting.sample_choice import MOST, PER_CLASS, Judged, choose, judge

from ..conftest import tiny_segformer


def judged(losses, classes):
    return Judged(torch.tensor(losses), [frozenset(labels) for labels in classes], torch.zeros(1, 1), False)


def test_the_worst_and_the_best_come_first_and_last():
    losses = [0.5, 4.0, 1.0, 3.0, 2.0, 0.1]
    assert choose(judged(losses, [{0}] * 6), 2) == [1, 3, 0, 5]


def test_every_class_is_shown():
    losses = [float(i) for i in range(20)]
    classes = [{0}] * 20
    classes[7], classes[8], classes[9] = {1}, {1, 2}, {1}
    chosen = choose(judged(losses, classes), 1)
    assert chosen == [19, 9, 8, 0]  # the worst and the best, and the worst of class 1, one of which shows class 2
    assert sum(1 in classes[i] for i in chosen) == PER_CLASS


def test_there_is_a_limit():
    chosen = choose(judged([float(i) for i in range(300)], [{i} for i in range(300)]), 4)
    assert len(chosen) == MOST


def test_a_small_split_is_shown_whole():
    assert choose(judged([1.0, 2.0], [{0}, {0}]), 8) == [1, 0]


def test_ignored_labels_are_not_counted():
    task = SemanticSegmentationTask(tiny_segformer(3), ignore_index=255).eval()
    images, targets = torch.rand(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    targets[0, :, :10] = 255
    loader = DataLoader([{"image": image, "target": target} for image, target in zip(images, targets, strict=True)])
    with torch.no_grad():
        predicted, found = task(images).argmax(1), judge(task, loader)
    pairs = [(targets == true) & (predicted == guess) for true in range(3) for guess in range(3)]
    assert found.has_ignored
    assert found.confusion.flatten().tolist() == [int(pair.sum()) for pair in pairs]
