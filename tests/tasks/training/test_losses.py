"""Losses by name, their sums, and class weights."""

import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    ImageClassificationTask,
    SemanticSegmentationTask,
)
from lora_plugins.tasks.training import Objective, balanced_weights

from ..conftest import scenes, tiny_segformer, tiny_vit

ALL = ("cross_entropy", "focal", "dice", "lovasz")


IGNORED = 255


def maps():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    masks = torch.randint(0, 3, (2, 4, 5), generator=generator)
    masks[:, 0] = IGNORED
    return logits, masks


def objective(text, **options):
    return Objective(text, ALL, ignore_index=IGNORED, **options)


@pytest.mark.parametrize("name", ALL)
def test_what_is_ignored_has_no_part_in_any_loss(name):
    logits, masks = maps()
    changed = logits.clone()
    changed[:, :, 0] += torch.randn(2, 3, 5)
    assert objective(name)(logits, masks) == pytest.approx(float(objective(name)(changed, masks)), abs=1e-6)
    assert float(objective(name)(logits, torch.full_like(masks, IGNORED))) == 0


@pytest.mark.parametrize("name", ALL)
def test_every_loss_falls_to_nothing_when_all_is_right(name):
    _, masks = maps()
    right = 200 * (torch.nn.functional.one_hot(masks.clamp(max=2), 3) - 0.5).permute(0, 3, 1, 2).float()
    assert objective(name)(right, masks) < 1e-3 < objective(name)(-right, masks)


@pytest.mark.parametrize("name", ALL)
def test_every_loss_goes_to_processes_that_are_spawned(name):
    there = pickle.loads(pickle.dumps(objective(name)))
    assert there(*maps()) == objective(name)(*maps())


def test_a_sum_adds_up_with_its_factors():
    logits, masks = maps()
    parts = [float(objective(name)(logits, masks)) for name in ("cross_entropy", "dice")]
    assert float(objective("cross_entropy + 0.5 * dice")(logits, masks)) == pytest.approx(parts[0] + 0.5 * parts[1])


def test_a_factor_may_have_an_exponent():
    assert objective("cross_entropy + 5e-1 * dice + .25E0*focal").factors == {
        "cross_entropy": 1.0,
        "dice": 0.5,
        "focal": 0.25,
    }


def test_weights_and_smoothing_are_those_of_torch():
    logits, masks = maps()
    weights = torch.tensor([0.5, 2.0, 1.0])
    found = objective("cross_entropy", label_smoothing=0.1)(logits, masks, weights)
    assert found == cross_entropy(logits, masks, weights, ignore_index=IGNORED, label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_classes_without_weight_alone_are_nothing(smoothing):
    logits, masks = maps()
    logits.requires_grad_()
    masks = torch.where(masks == IGNORED, IGNORED, 0)
    weights = torch.tensor([0.0, 1.0, 1.0])
    loss = objective("cross_entropy", label_smoothing=smoothing)(logits, masks, weights)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    summed = objective("cross_entropy + dice", label_smoothing=smoothing)(logits, masks, weights)
    assert summed == objective("dice")(logits, masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_loss_is_the_same_in_every_precision(name, dtype):
    """Of more pixels than float16 can count; class weights have the precision of the network."""
    logits, masks = (tensor.repeat_interleave(41, -1).repeat_interleave(41, -2) for tensor in maps())
    logits, weights = logits.to(dtype), torch.tensor([0.5, 2.0, 1.0])
    assert masks.numel() > torch.finfo(torch.float16).max
    expected = objective(name)(logits.float(), masks, weights)
    found = objective(name)(logits, masks, weights.to(dtype)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert float(objective(name)(logits, torch.full_like(masks, IGNORED))) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("text", ["lovasz", "cross_entropy + dice"])
def test_segmentation_trains_in_every_precision(text, precision, trainer):
    run = trainer(precision=precision)
    run.fit(SemanticSegmentationTask(tiny_segformer(), loss=text), datamodule=scenes())
    assert run.callback_metrics["train/loss"] > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 9.0, 1.0], [1.0, 0.0, 0.0]], ids=["alike", "weighed", "one counts"])
def test_soft_targets_of_one_class_each_are_labels(weights, smoothing):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    soft, weights = one_hot(labels, 3).float(), None if weights is None else torch.tensor(weights)
    halved = objective("0.5 * cross_entropy", label_smoothing=smoothing)
    torch.testing.assert_close(halved(logits, soft, weights), halved(logits, labels, weights))
    assert halved.weight(soft, weights) == halved.weight(labels, weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_of_classes_without_weight_alone_are_nothing(smoothing):
    logits, soft = torch.randn(4, 3, requires_grad=True), torch.tensor([[0.3, 0.7, 0.0]]).expand(4, 3)
    loss = objective("cross_entropy", label_smoothing=smoothing)(logits, soft, torch.tensor([0.0, 0.0, 1.0]))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_balanced_weights_make_up_for_counts():
    weights = balanced_weights(torch.tensor([10, 0, 30]))
    assert weights.tolist() == pytest.approx([2.0, 1.0, 2 / 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cross_entrpy", "Did you mean 'cross_entropy'"),
        ("dice + dice", "dice twice"),
        ("dice +", "cannot be read"),
        ("2 dice", "cannot be read"),
        ("-1 * dice", "cannot be read"),
        (". * dice", "cannot be read"),
        ("1.2.3 * dice", "cannot be read"),
    ],
)
def test_wrong_sums(text, message):
    with pytest.raises(ConfigError, match=message):
        objective(text)


@pytest.mark.parametrize("text", [*ALL, "focal + 0.5 * lovasz"])
def test_segmentation_trains_with_each(text, trainer):
    data = scenes()
    run = trainer()
    run.fit(SemanticSegmentationTask(tiny_segformer(), loss=text), datamodule=data)
    assert run.callback_metrics["train/loss"] > 0


class TestWeights:
    def test_balanced_ones_are_counted_in_the_train_split(self, trainer):
        task, data = SemanticSegmentationTask(tiny_segformer(), class_weights="balanced"), scenes()
        trainer(max_steps=1).fit(task, datamodule=data)
        counts = torch.bincount(data.splits["train"].targets.flatten(), minlength=4)
        torch.testing.assert_close(task.weights, balanced_weights(counts))

    def test_they_take_a_data_module(self, trainer):
        task = ImageClassificationTask(tiny_vit(), class_weights="balanced")
        loader = DataLoader(TensorDataset(torch.rand(2, 3, 16, 16), torch.tensor([0, 1])))
        with pytest.raises(ConfigError, match="takes a data module"):
            trainer().fit(task, loader, loader)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"class_weights": [1.0, 2.0]}, "a list of 3 numbers"),
            ({"class_weights": "balance"}, "'balanced'"),
            ({"class_weights": "balanced", "loss": "focal"}, "for cross_entropy"),
        ],
        ids=["count", "word", "loss"],
    )
    def test_wrong_ones(self, options, message):
        with pytest.raises(ConfigError, match=message):
            ImageClassificationTask(tiny_vit(), **options)
