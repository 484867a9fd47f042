"""Arguments of all public classes and functions of the tasks that cannot be are refused where they are given, by name.

Values of a wrong type are found by the annotations of each; values that are wrong for another reason are listed.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lora_plugins import ConfigError, tasks
from lora_plugins.integrations.diffusers import Sampling
from lora_plugins.tasks import (
    ClassPictures,
    DigitPicturesDataModule,
    DigitScenesDataModule,
    DigitsDataModule,
    HtmlReport,
    ImageClassificationTask,
    ImageFolderDataModule,
    ImageListDataModule,
    MaskFolderDataModule,
    PredictionPicture,
    SamplePictures,
    SavePipeline,
    SemanticSegmentationTask,
    draw_predictions,
    predict_folder,
    warmup_cosine,
)

from .conftest import tiny_segformer, tiny_vit

OF_TASKS = {
    "loss": [None, ["dice"], ""],
    "label_smoothing": ["0.1", None, float("nan"), True, 1.0],
    "class_weights": [
        *(5, {"a": 1.0}, [1.0], ["1", "2", "3"], [float("nan"), 1, 1], [1, 1, -1]),
        *(torch.ones(3), np.ones(3)),
    ],
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
    "weights": [3, None, True, ""],
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
OF_PICTURES = {**OF_REPORTS, "path": ["masks", "masks.txt", Path("masks.jpg"), "", None]}
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
    "picture": (OF_PICTURES, lambda **given: PredictionPicture(**{"path": "masks.png", **given})),
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


SEGMENTER = SemanticSegmentationTask(tiny_segformer())
DOGS = {"folder": "dogs", "prompts": ["a dog"]}
GIVEN = {
    "ClassPictures": DOGS,
    "DigitPicturesDataModule": {"root": "digits"},
    "HtmlReport": {"path": "report.html"},
    "HubImageDataModule": {"name": "rows"},
    "HubMaskDataModule": {"name": "rows", "classes": ["a", "b"]},
    "ImageClassificationTask": {"model": tiny_vit()},
    "ImageFolderDataModule": {"root": "pictures"},
    "ImageListDataModule": {"file": "list.csv"},
    "MaskFolderDataModule": {"root": "pictures", "classes": ["a", "b"]},
    "MaskListDataModule": {"file": "list.csv", "classes": ["a", "b"]},
    "ModelConfig": {"source": "timm", "name": "vit", "num_classes": 2, "weights": "none"},
    "PicturesDataModule": {"root": "pictures"},
    "PredictionPicture": {"path": "masks.png"},
    "ReadDigits": {"folder": "digits", "digits": {"a nine": 9}, "subject": "a nine"},
    "SamplePictures": DOGS,
    "SavePipeline": {"folder": "pipeline"},
    "SemanticSegmentationTask": {"model": tiny_segformer()},
    "TextToImageTask": {"model": "package:digits_diffusion"},
    "draw_predictions": {"task": SEGMENTER, "loader": DataLoader([0]), "indices": [0], "path": "masks.png"},
    "export_task": {"task": SEGMENTER, "path": "model.pt2"},
    "load_base": {"path": "adapter"},
    "load_task": {"path": "adapter"},
    "merged_task": {"path": "adapter"},
    "predict_folder": {"task": SEGMENTER, "images": "pictures", "out": "out"},
    "warmup_cosine": {"optimizer": torch.optim.SGD([torch.zeros(1)]), "steps": 3},
}
"""What each takes at least."""

OF_PYTHON = {"VisionDataModule", "DataError", "ReportError", "WeightsError"}
"""A base class for data modules of one's own, and errors."""


def parameters(made):
    """The parameters of a function, or of a class with those that it hands on to the classes it inherits from."""
    found = {}
    for each in [c.__init__ for c in made.__mro__ if "__init__" in vars(c)] if inspect.isclass(made) else [made]:
        declared = inspect.signature(each, eval_str=True).parameters
        found = {**declared, **found}
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in declared.values()):
            break
    return [p for p in found.values() if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]


def fits(value, declared):
    """Whether a value is of a type, as annotations declare it; a True is no number here."""
    origin, inside = typing.get_origin(declared) or declared, typing.get_args(declared)
    if declared is typing.Any or origin in (typing.Union, types.UnionType):
        return declared is typing.Any or any(fits(value, each) for each in inside)
    if isinstance(value, bool):
        return origin is bool
    if origin in (Sequence, list, tuple):
        of = inside[:1] if Ellipsis in inside or origin is not tuple else inside
        return isinstance(value, list | tuple) and all(fits(each, kind) for each in value for kind in of)
    kinds = {Path: (str, Path), float: (int, float), Mapping: (dict,), Callable: (Callable,)}
    return isinstance(value, kinds.get(origin, (type(None) if origin is None else origin,)))


VALUES = (None, True, 3, 2.5, "text", ["text"], [3.5], {}, {"a": []}, object())
CASES = [
    pytest.param(name, parameter, id=f"{name}-{parameter.name}")
    for name in tasks.__all__
    if name not in OF_PYTHON
    for parameter in parameters(getattr(tasks, name))
]


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_what_is_of_a_wrong_type_is_refused_by_name(name, parameter):
    for value in (value for value in VALUES if not fits(value, parameter.annotation)):
        with pytest.raises(ConfigError, match=parameter.name):
            getattr(tasks, name)(**{**GIVEN.get(name, {}), parameter.name: value})


def test_digits_and_places_come_in_any_sequence(tmp_path):
    assert DigitsDataModule(digits=range(3)).digits == [0, 1, 2]
    scenes = DigitScenesDataModule(range(1, 3), canvas=32, train_scenes=1, val_scenes=2, test_scenes=0)
    scenes.setup("fit")
    task = SemanticSegmentationTask(replace(tiny_segformer(), num_classes=3))
    assert draw_predictions(task, scenes.val_dataloader(), range(2), tmp_path / "masks.png").is_file()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DigitPicturesDataModule("digits", digit=11), "^digit is a digit, a whole number from 0 to 9, not 11"),
        (lambda: DigitScenesDataModule(digit_sizes=12), "^digit_sizes is the smallest and the largest side in pixels"),
        (lambda: DigitScenesDataModule(digit_sizes=(0, 9)), "^digit_sizes is a whole number of at least 1, not 0"),
        (lambda: warmup_cosine(3, 4), "^optimizer is 3. It has to be of the class Optimizer"),
        (lambda: predict_folder(SEGMENTER, [], "out"), r"^images is \[\]. It is a path, or a list of at least one"),
        (
            lambda: draw_predictions(SEGMENTER, DataLoader([0]), [], "masks.png"),
            r"^indices is a list of at least one whole number, not \[\]",
        ),
    ],
    ids=["digit", "one side", "no side", "optimizer", "no image", "no place"],
)
def test_messages_say_what_an_argument_is(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


IN_THE_HOME = {
    "report": lambda: HtmlReport("~/report.html").path,
    "picture": lambda: PredictionPicture("~/picture.png").path,
    "samples": lambda: SamplePictures("~/samples", ["a dog"]).folder,
    "pipeline": lambda: SavePipeline("~/pipeline").folder,
}


@pytest.mark.parametrize("place", IN_THE_HOME.values(), ids=IN_THE_HOME)
def test_a_place_of_results_may_be_below_the_home(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(place()).parent == tmp_path
