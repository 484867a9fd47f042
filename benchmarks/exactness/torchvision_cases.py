"""The families of torchvision: classification, segmentation, detection and video."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation, video
from torchvision.models.video.mvit import MSBlockConfig

from benchmarks.exactness.cases import Case

CLASSES = 4

CLASSIFICATION: Mapping[str, int] = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "wide_resnet50_2": 64,
}
"""Constructors of `torchvision.models`, and the input size; their members of other sizes have the same layers."""

SEGMENTATION = ("deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")

_SIZE: dict[str, Any] = {"min_size": 64, "max_size": 96}
_RCNN: dict[str, Any] = _SIZE | {
    "box_score_thresh": 0.0,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
}
"""Few boxes, and all of them: with random weights no score is high."""

DETECTION: Mapping[str, Mapping[str, Any]] = {
    "fasterrcnn_resnet50_fpn": _RCNN,
    "fasterrcnn_resnet50_fpn_v2": _RCNN,
    "fasterrcnn_mobilenet_v3_large_fpn": _RCNN,
    "maskrcnn_resnet50_fpn": _RCNN,
    "maskrcnn_resnet50_fpn_v2": _RCNN,
    "keypointrcnn_resnet50_fpn": _RCNN,
    "retinanet_resnet50_fpn": _SIZE | {"score_thresh": 0.0},
    "retinanet_resnet50_fpn_v2": _SIZE | {"score_thresh": 0.0},
    "fcos_resnet50_fpn": _SIZE | {"score_thresh": 0.0},
    "ssd300_vgg16": {"score_thresh": 0.0},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0},
}
"""Constructors of `torchvision.models.detection` and their options."""

VIDEO: Mapping[str, tuple[int, int]] = {
    "r3d_18": (4, 32),
    "mc3_18": (4, 32),
    "r2plus1d_18": (4, 32),
    "s3d": (16, 209),  # it pools 7 by 7 at stride 32
    "swin3d_t": (4, 64),
}
"""Constructors of `torchvision.models.video`, with frames and size."""

_BARE = {"weights": None, "weights_backbone": None}


def torchvision_cases() -> list[Case]:
    """Returns all cases."""
    return [
        *(_case(name, partial(getattr(models, name), num_classes=CLASSES), 1, 3, s, s)
          for name, s in CLASSIFICATION.items()),
        _case("vit_b_16, smaller", _vit, 1, 3, 32, 32),
        *(_case(name, partial(getattr(segmentation, name), num_classes=CLASSES, **_BARE), 1, 3, 64, 64)
          for name in SEGMENTATION),
        *(_case(name, partial(getattr(video, name), num_classes=CLASSES), 1, 3, frames, s, s)
          for name, (frames, s) in VIDEO.items()),
        _case("mvit_v2_s, smaller", _mvit, 1, 3, 4, 32, 32),
        *(Case("torchvision", name, partial(getattr(detection, name), num_classes=CLASSES, **_BARE, **options), _detect)
          for name, options in DETECTION.items()),
    ]  # fmt: skip


def _case(name: str, build: Callable[[], nn.Module], *shape: int) -> Case:
    return Case("torchvision", name, build, lambda model: model(torch.randn(shape)))


def _vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES
    )


def _mvit() -> nn.Module:
    """The options of `mvit_v2_s`, whose constructor takes no other size."""
    blocks = [
        MSBlockConfig(
            num_heads=heads,
            input_channels=channels,
            output_channels=heads * 16,
            kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=[1, stride, stride],
            stride_kv=[1, 1, 1],
        )
        for heads, channels, stride in ((1, 16, 1), (2, 16, 2), (2, 32, 1))
    ]
    return video.MViT(
        spatial_size=(32, 32), temporal_size=4, block_setting=blocks, residual_pool=True, num_classes=CLASSES,
        residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True,
    )  # fmt: skip


def _detect(model: nn.Module) -> Any:
    """Runs a detector as in training, for its losses, and as in evaluation, for its detections.

    Only the modules that ask for targets are in training mode: statistics and dropout stay as in evaluation.
    """
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    # Of every size, so that every level of a pyramid has its match.
    boxes = torch.tensor([[4.0, 6, 40, 50], [20.0, 10, 60, 44], [0.0, 0, 64, 64], [10.0, 10, 22, 22]])
    masks = torch.zeros(4, 72, 80, dtype=torch.uint8)
    masks[:, 10:44, 20:40] = 1
    keypoints = torch.tensor(
        [[[24, 20, 1]] * 17, [[40, 30, 1]] * 17, [[9, 60, 1]] * 17, [[12, 20, 1]] * 17], dtype=torch.float32
    )  # the type it asks for
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 2, 3, 1]), "masks": masks[:, : i.shape[1], : i.shape[2]],
         "keypoints": keypoints}
        for i in images
    ]  # fmt: skip
    modules = [m for m in (model, getattr(model, "rpn", None), getattr(model, "roi_heads", None)) if m is not None]
    detections = model(images)
    for module in modules:
        module.training = True
    try:
        return model(images, targets), detections
    finally:
        for module in modules:
            module.training = False
