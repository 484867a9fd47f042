"""Results of classes, from confusion matrices."""

import torch

from lora_plugins.tasks.reporting.class_results import class_results, mean_iou, most_confused

AFTER = torch.tensor([[8, 2, 0], [1, 4, 0], [0, 0, 0]])
BEFORE = torch.tensor([[5, 0, 5], [5, 0, 0], [0, 0, 0]])


def results(per_pixel):
    return class_results(["a", "b", "c"], AFTER, BEFORE, torch.tensor([20, 10, 0]), per_pixel=per_pixel)


def test_iou_of_masks():
    assert [(r.before, r.after) for r in results(True)] == [(5 / 15, 8 / 11), (0.0, 4 / 7), (0.0, None)]


def test_recall_of_labels():
    assert [(r.before, r.after) for r in results(False)] == [(0.5, 0.8), (0.0, 0.8), (None, None)]


def test_counts_and_precision():
    assert [(r.train, r.val, r.precision) for r in results(True)] == [(20, 10, 8 / 9), (10, 5, 4 / 6), (0, 0, None)]


def test_without_a_matrix_before_there_is_no_before():
    assert [r.before for r in class_results(["a", "b", "c"], AFTER, None, None, per_pixel=True)] == [None] * 3


def test_the_most_confused_are_beside_the_diagonal():
    assert most_confused(AFTER) == ((0, 1, 2), (1, 0, 1))


def test_mean_iou_is_over_classes_that_occur():
    assert mean_iou(AFTER) == (8 / 11 + 4 / 7) / 2
    assert mean_iou(torch.zeros(2, 2, dtype=torch.long)) is None
