"""A run as a fit might have left it, and samples of it."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lora_plugins.tasks.pages import ClassResult, Costs, Example, Metric, PlanRow, RunRecord

NAMES = ["background", "a <b>bold</b> class", "Ausfahrt & Straße"]


def picture(color, width=60, height=40, mode="RGB"):
    """A `data:` URL of one color."""
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), color, dtype=np.uint8)).convert(mode).save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def run_of(per_pixel=True, **changes):
    """A run of masks, or of labels."""
    main, of_class = ("mean_iou", "iou") if per_pixel else ("accuracy", "recall")
    classes = tuple(
        ClassResult(name, color, before, after, 0.8, train, val)
        for name, color, before, after, train, val in zip(
            NAMES, ["#141414", "#e69f00", "#56b4e9"], [0.9, 0.1, None], [0.95, 0.7, None], [70, 20, 0], [60, 40, 0],
            strict=True,
        )
    )  # fmt: skip
    run = RunRecord(
        model="segformer",
        data="Scenes",
        method="LoRA, r=8",
        date="2026-01-02 03:04",
        per_pixel=per_pixel,
        main_metric=main,
        metrics={main: Metric(0.25, 0.825), "loss": Metric(1.5, 0.25), "unheard_of": Metric(None, 7.0)},
        class_metric=of_class,
        classes=classes,
        confusion=((57, 3, 0), (12, 28, 0), (0, 0, 0)),
        confused=((1, 0, 12), (0, 1, 3)),
        history={
            f"val/{main}": ((0.0, 0.25), (1.0, 0.6), (2.0, 0.825)),
            f"train/{main}": ((1.0, 0.7), (2.0, 0.9)),
            "val/loss": ((0.0, 1.5), (1.0, 0.5), (2.0, 0.25)),
            "train/loss": ((1.0, 0.4), (2.0, None)),
        },
        costs=Costs(1000, 20000, 75.0, 30.0, 500.0, None, {"adapter": 5000}),
        plan=(PlanRow("blocks.0-11.attn.qkv", 12, "Linear", "linear", 8, 16.0, 1000, 0.05),),
        trained={"head": 2},
        facts={"Training": {"epochs": "2", "learning rate": "0.005"}},
        next_steps={"Predict": "python -m lora_plugins.tasks predict 'a b' IMAGES OUT"},
    )
    return replace(run, **changes)


@pytest.fixture
def masks():
    """Three samples with masks, worst first: of classes 0, of 0 and 1, and of 0."""
    shown = {"image": picture((200, 0, 0)), "truth": picture((0, 200, 0)), "prediction": picture((0, 0, 200))}
    rows = [(2.0, (0, 1)), (1.0, (0,)), (0.5, (0, 1))]
    return [
        Example(f"folder/scene {i}", width=60, height=40, loss=loss, classes=classes, score=0.5, **shown)
        for i, (loss, classes) in enumerate(rows)
    ]


@pytest.fixture
def labels():
    """Two samples with labels: one that is taken for another, one that is right."""
    shown = {"image": picture((200, 0, 0)), "width": 60, "height": 40}
    ranking = ((1, 0.75), (0, 0.2), (2, 0.05))
    return [
        Example("x", loss=2.0, classes=(0, 1), true_class=0, ranking=ranking, **shown),
        Example("y", loss=0.1, classes=(1,), true_class=1, ranking=ranking, **shown),
    ]
