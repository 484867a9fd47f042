"""torch-uncertainty, kaiko-eva and lightly-train: routines around a network of one's own, and self-supervision."""

import torch
from torch import nn

from tests.modules.case import Case
from tests.modules.data import image, loader


def _network(outputs: int):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, outputs),
    )


def _pixels(outputs: int):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, outputs, 1))


def _adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def _routine(name, batches, arguments):
    def complete():
        return {**arguments(), "optim_recipe": _adam}

    def build():
        from torch_uncertainty import routines

        return getattr(routines, name)(**complete())

    return Case("torch-uncertainty", name, build, batches, arguments=complete, objects=True)


def _labelled():
    return loader(lambda at: (image(), torch.tensor(at % 3)))


def _squares():
    return {"loss": nn.MSELoss()}


def _masked():
    return loader(lambda at: (image(), torch.randint(0, 3, (32, 32))))


def _head_arguments():
    backbone = nn.Sequential(*list(_network(1))[:-1])
    return {"head": nn.Linear(8, 3), "criterion": nn.CrossEntropyLoss(), "backbone": backbone}


def _head():
    from eva.core.models.modules import HeadModule

    return HeadModule(**_head_arguments())


def _with_metadata():
    return loader(lambda at: (image(), torch.tensor(at % 3), {"number": at}))


def _method(name, **given):
    def arguments():
        import importlib

        from lightly_train._models.embedding_model import EmbeddingModel
        from lightly_train._models.torchvision.resnet import ResNetModelWrapper
        from lightly_train._optim.adamw_args import AdamWArgs
        from torchvision.models import resnet18

        module = importlib.import_module(f"lightly_train._methods.{name.lower()}.{name.lower()}")
        return {
            "method_args": getattr(module, f"{name}Args")(**given),
            "optimizer_args": AdamWArgs(),
            "embedding_model": EmbeddingModel(ResNetModelWrapper(resnet18())),
            "global_batch_size": 4,
            "num_input_channels": 3,
        }

    def build():
        import importlib

        module = importlib.import_module(f"lightly_train._methods.{name.lower()}.{name.lower()}")
        return getattr(module, name)(**arguments())

    def collate(items):
        views = [torch.stack(pair) for pair in zip(*items, strict=True)]
        return {"views": views, "filename": ["" for _ in items]}

    return Case(
        "lightly-train",
        name,
        build,
        lambda: loader(lambda at: (image(size=64), image(size=64)), collate=collate),
        arguments=arguments,
        objects=True,
    )


CASES = [
    _routine(
        "ClassificationRoutine",
        _labelled,
        lambda: {"model": _network(3), "num_classes": 3, "loss": nn.CrossEntropyLoss()},
    ),
    _routine(
        "SegmentationRoutine",
        _masked,
        lambda: {"model": _pixels(3), "num_classes": 3, "loss": nn.CrossEntropyLoss(), "metric_subsampling_rate": 1.0},
    ),
    _routine(
        "RegressionRoutine",
        lambda: loader(lambda at: (torch.randn(4), torch.randn(()))),
        lambda: {"model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), "output_dim": 1, **_squares()},
    ),
    _routine(
        "PixelRegressionRoutine",
        lambda: loader(lambda at: (image(), torch.rand(32, 32))),
        lambda: {"model": _pixels(1), "output_dim": 1, **_squares()},
    ),
    Case("kaiko-eva", "HeadModule", _head, _with_metadata, arguments=_head_arguments, objects=True),
    Case(
        "kaiko-eva",
        "HeadModule-backbone",
        _head,
        _with_metadata,
        {"target_modules": ["backbone.0"], "modules_to_save": ["head"]},
        arguments=_head_arguments,
        objects=True,
    ),
    _method("SimCLR", hidden_dim=16, output_dim=8),
]
