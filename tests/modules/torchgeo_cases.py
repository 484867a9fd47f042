"""torchgeo: classification, regression, segmentation, change, detection, instances, self-supervision."""

import torch

from tests.modules.case import Case
from tests.modules.data import image, loader


def _labels(key: str = "label", kind: str = "class", size: int = 32):
    def make(at: int):
        value = {
            "class": lambda: torch.tensor(at % 3),
            "many": lambda: torch.randint(0, 2, (3,)),
            "number": lambda: torch.rand(1),
            "mask": lambda: torch.randint(0, 3, (size, size)),
            "field": lambda: torch.rand(size, size),
        }[kind]()
        return {"image": image(size=size), key: value}

    return lambda: loader(make)


def _changes(at: int):
    return {"image": torch.rand(2, 3, 32, 32), "mask": torch.randint(0, 2, (1, 32, 32))}


def _boxes(masks: bool):
    def make(at: int):
        item = {
            "image": image(size=64),
            "bbox_xyxy": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
            "label": torch.tensor([1]),
        }
        return {**item, "mask": torch.ones(1, 64, 64, dtype=torch.uint8)} if masks else item

    def collate(items):
        whole = {key: [item[key] for item in items] for key in items[0]}
        return {**whole, "image": torch.stack(whole["image"])}

    return lambda: loader(make, 4, 2, collate)


def _task(name: str, **arguments):
    def build():
        from torchgeo import trainers

        return getattr(trainers, name)(**arguments)

    return build


def _case(name, what, batches, config=None, by_hand=(), **arguments):
    return Case(
        "torchgeo",
        f"{name}-{what}" if what else name,
        _task(name, **arguments),
        batches,
        config=config or {},
        by_hand=by_hand,
    )


HEAD = {"modules_to_save": ["fc"]}
CASES = [
    _case("ClassificationTask", "resnet18", _labels(), model="resnet18", num_classes=3, config=HEAD),
    _case("ClassificationTask", "vit", _labels(size=224), model="vit_tiny_patch16_224", num_classes=3),
    _case("ClassificationTask", "convnext", _labels(), model="convnext_atto", num_classes=3),
    _case(
        "ClassificationTask",
        "efficientnet",
        _labels(),
        model="efficientnet_b0",
        num_classes=3,
    ),
    _case(
        "ClassificationTask",
        "multilabel",
        _labels(kind="many"),
        model="resnet18",
        task="multilabel",
        num_labels=3,
        loss="bce",
    ),
    _case("RegressionTask", "", _labels(kind="number"), model="resnet18", num_outputs=1),
    *(
        _case(
            "SemanticSegmentationTask", model, _labels("mask", "mask"), model=model, backbone="resnet18", num_classes=3
        )
        for model in ("unet", "deeplabv3+", "fcn", "segformer", "upernet")
    ),
    _case("PixelwiseRegressionTask", "", _labels("mask", "field"), model="unet", backbone="resnet18"),
    _case("ChangeDetectionTask", "unet", lambda: loader(_changes), model="unet", backbone="resnet18"),
    _case("ChangeDetectionTask", "fcsiamdiff", lambda: loader(_changes), model="fcsiamdiff", backbone="resnet18"),
    *(
        _case("ObjectDetectionTask", model, _boxes(False), model=model, backbone="resnet18", num_classes=2)
        for model in ("faster-rcnn", "retinanet", "fcos")
    ),
    _case("InstanceSegmentationTask", "mask-rcnn", _boxes(True), model="mask-rcnn", backbone="resnet50", num_classes=2),
    _case(
        "SimCLRTask",
        "",
        _labels(),
        model="resnet18",
        version=2,
        layers=3,
        memory_bank_size=8,
        size=32,
        hidden_dim=16,
        output_dim=8,
    ),
    *(
        _case(
            "MoCoTask",
            f"v{version}",
            _labels(),
            model="resnet18",
            version=version,
            layers=layers,
            hidden_dim=16,
            output_dim=dim,
            memory_bank_size=bank,
            size=32,
            by_hand=("backbone_momentum", "projection_head_momentum"),
        )
        for version, layers, dim, bank in ((1, 1, 512, 8), (2, 2, 8, 8), (3, 3, 8, 0))
    ),
    _case(
        "BYOLTask",
        "",
        _labels(),
        model="resnet18",
        by_hand=("model.target",),
    ),
]
