"""terratorch: backbones of timm in tasks for pictures of the earth."""

import torch

from tests.modules.case import Case
from tests.modules.data import image, loader


def _batches(key, make):
    return lambda: loader(lambda at: {"image": image(size=64), key: make(at)})


def _case(name, what, batches, model, **arguments):
    def build():
        from terratorch import tasks

        return getattr(tasks, name)(model_factory="EncoderDecoderFactory", model_args=dict(model), **arguments)

    return Case("terratorch", f"{name}-{what}", build, batches)


def _model(backbone, decoder, **more):
    return {"backbone": backbone, "backbone_pretrained": False, "decoder": decoder, **more}


CLASSES = {"num_classes": 3}
CASES = [
    _case(
        "ClassificationTask",
        "resnet18",
        _batches("label", lambda at: torch.tensor(at % 3)),
        _model("timm_resnet18", "IdentityDecoder", **CLASSES),
        loss="ce",
    ),
    _case(
        "SemanticSegmentationTask",
        "fcn",
        _batches("mask", lambda at: torch.randint(0, 3, (64, 64))),
        _model("timm_resnet18", "FCNDecoder", **CLASSES),
        loss="ce",
        ignore_index=-100,
    ),
    _case(
        "SemanticSegmentationTask",
        "uper",
        _batches("mask", lambda at: torch.randint(0, 3, (64, 64))),
        _model("timm_convnext_atto", "UperNetDecoder", **CLASSES),
        loss="ce",
        ignore_index=-100,
    ),
    _case(
        "PixelwiseRegressionTask",
        "fcn",
        _batches("mask", lambda at: torch.rand(64, 64)),
        _model("timm_resnet18", "FCNDecoder"),
        loss="mse",
    ),
]
