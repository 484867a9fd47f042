"""Arguments of tasks and data modules that cannot be are refused where they are given, by name."""

from dataclasses import replace

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.integrations.diffusers import Sampling
from lora_plugins.tasks import (
    ClassPictures,
    HtmlReport,
    ImageClassificationTask,
    ImageFolderDataModule,
    ImageListDataModule,
    MaskFolderDataModule,
    PredictionPicture,
    SamplePictures,
)

from .conftest import tiny_vit

OF_TASKS = {
    "loss": [None, ["dice"], ""],
    "label_smoothing": ["0.1", None, float("nan"), True, 1.0],
    "class_weights": [5, {"a": 1.0}, [1.0], ["1", "2", "3"], [float("nan"), 1, 1], [1, 1, -1], torch.ones(3)],
    "optimizer": ["adam"],
    "lr": ["1e-3", None, -1.0, float("nan"), float("inf"), True],
    "weight_decay": ["0", -1, float("inf")],
    "lr_scheduler": ["cosine", 3],
    "ema": ["0.9", None, 1.0, float("nan")],
    "gradient_checkpointing": ["yes", 1, None],
    "ignore_index": ["255", 2.5, None],
    "class_names": ["abc", ["a", "a", "b"], ["a", "a", "b", "c"], [1, 2, 3], ["a", "b"]],
    "mixup": ["0.2", -1, float("nan")],
    "cutmix": ["1", -1],
}
OF_MODELS = {
    "source": ["timmm", None],
    "name": [None, 3],
    "num_classes": ["3", 0, 2.5, True, None],
    "weights": [3, None, True],
    "options": [None, 3, []],
    "mean": [0.5, ("a", "b", "c"), (0.5,)],
    "head": ["old", None],
}
OF_DATA = {
    "batch_size": ["4", 0, None, 2.5],
    "num_workers": ["1", -1, None],
    "sampler": [None, "balancd"],
    "image_size": [32, (32,), "32", (32, 0), (32.0, 32.0)],
    "val_share": ["0.1", None, 1.0, -0.1],
    "test_share": ["0.1", 1.0],
    "split_seed": ["1", None, 1.5],
    "augmentation": [None, "flop", 3],
    "interpolation": ["cubic", 3],
    "check_files": ["yes", None],
    "on_problem": ["ignore", None],
}
OF_LISTS = {"classes": ["abc", [1, 2], 3]}
OF_MASKS = {
    "classes": ["abc", [1, 2], 3],
    "colors": ["red", [(0, 0, 0)]],
    "ignore_index": ["255", None],
    "reduce_labels": ["no", 1],
}
OF_SAMPLES = {"prompts": ["a dog", [], [" "], [3]], "pictures": ["2", 0, 1.5], "every": [None, 0]}
OF_CLASS_PICTURES = {"prompts": ["a dog", [], [" "]], "count": [0, "3", 2.5], "generate": ["no"], "folder": [None]}
OF_SAMPLING = {"steps": ["20", 0], "guidance": ["5", float("nan")], "height": [0, "64"], "batch_size": [None, 0]}
OF_REPORTS = {"samples": ["3", 0, 2.5]}
MAKERS = {
    "task": (OF_TASKS, lambda **given: ImageClassificationTask(tiny_vit(), **given)),
    "model": (OF_MODELS, lambda **given: ImageClassificationTask(replace(tiny_vit(), **given))),
    "data": (OF_DATA, lambda **given: ImageFolderDataModule("pictures", **given)),
    "list": (OF_LISTS, lambda **given: ImageListDataModule("list.csv", **given)),
    "masks": (OF_MASKS, lambda **given: MaskFolderDataModule("pictures", **{"classes": ["a", "b"], **given})),
    "samples": (OF_SAMPLES, lambda **given: SamplePictures("out", **{"prompts": ["a dog"], **given})),
    "class": (OF_CLASS_PICTURES, lambda **given: ClassPictures(**{"folder": "dogs", "prompts": ["a dog"], **given})),
    "sampling": (OF_SAMPLING, lambda **given: Sampling(**{"width": 64, "height": 64, **given})),
    "report": (OF_REPORTS, lambda **given: HtmlReport("report.html", **given)),
    "picture": (OF_REPORTS, lambda **given: PredictionPicture("masks.png", **given)),
}


@pytest.mark.parametrize(
    ("maker", "name", "value"),
    [
        pytest.param(maker, name, value, id=f"{kind}-{name}-{type(value).__name__}{at}")
        for kind, (wrong, maker) in MAKERS.items()
        for name, values in wrong.items()
        for at, value in enumerate(values)
    ],
)
def test_what_cannot_be_is_refused_by_name(maker, name, value):
    with pytest.raises(ConfigError, match=name):
        maker(**{name: value})


@pytest.mark.parametrize("weights", [(1.0, 2.0, 3.0), [1, 2, 3]], ids=["tuple", "whole"])
def test_class_weights_of_any_sequence_of_numbers(weights):
    task = ImageClassificationTask(tiny_vit(), class_weights=weights)
    assert torch.equal(task.weights, torch.tensor([1.0, 2.0, 3.0]))
    assert task.loss(torch.zeros(3, 3), torch.tensor([0, 1, 2])).isfinite()
