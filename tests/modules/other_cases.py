"""lightly, deepforest (both import pytorch_lightning) and chemprop."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from tests.modules.case import Case
from tests.modules.data import folder_until_exit, image, loader


def _features():
    from torchvision.models import resnet18

    network = resnet18()
    network.fc = torch.nn.Identity()
    return {"model": network}


def _classifier(name: str):
    def build():
        from lightly.utils import benchmarking

        return getattr(benchmarking, name)(
            **_features(), batch_size_per_device=4, feature_dim=512, num_classes=3, topk=(1,)
        )

    return build


def _labelled():
    return loader(lambda at: (image(), torch.tensor(at % 3)))


def _molecules():
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader

    smiles = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "CCCl", "CNC", "COC"]
    points = [MoleculeDatapoint.from_smi(each, [float(at)]) for at, each in enumerate(smiles)]
    return build_dataloader(MoleculeDataset(points), batch_size=4, num_workers=0, shuffle=False)


def _mpnn(kind: str):
    def build():
        from chemprop import models, nn

        passing = getattr(nn, kind)(d_h=16)
        return models.MPNN(passing, nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=16))

    return build


@contextmanager
def _random_retinanet() -> Iterator[None]:
    """Lets torchvision make its detector without weights, and not enlarge pictures: deepforest cannot ask for it."""
    from torchvision.models import detection

    make, transform = detection.retinanet_resnet50_fpn, detection.transform.GeneralizedRCNNTransform

    def without(**_):
        return make(weights=None, weights_backbone=None)

    def small(_min_size, _max_size, *facts, **options):
        return transform(64, 64, *facts, **options)

    with (
        mock.patch.object(detection, "retinanet_resnet50_fpn", without),
        mock.patch.object(detection.retinanet, "GeneralizedRCNNTransform", small),
    ):
        yield


@functools.cache
def _trees() -> Path:
    """Writes pictures with a tree each, and the table that says where."""
    from PIL import Image

    folder = folder_until_exit()
    for at in range(4):
        Image.new("RGB", (64, 64), (at * 40, 100, 50)).save(folder / f"{at}.png")
    lines = ["image_path,xmin,ymin,xmax,ymax,label", *(f"{at}.png,8,8,40,40,Tree" for at in range(4))]
    (folder / "trees.csv").write_text("\n".join(lines))
    return folder


def _forest_arguments():
    files = {"csv_file": str(_trees() / "trees.csv"), "root_dir": str(_trees())}
    return {
        "config_args": {
            "model": {"name": None},
            "train": files,
            "validation": files,
            "workers": 0,
            "batch_size": 2,
            "num_classes": 1,
            "label_dict": {"Tree": 0},
        }
    }


def _forest():
    from deepforest import main

    return main.deepforest(**_forest_arguments())


CASES = [
    Case(
        "lightly",
        "LinearClassifier",
        _classifier("LinearClassifier"),
        _labelled,
        {"target_modules": ["classification_head"]},
        arguments=_features,
        objects=True,
    ),
    Case(
        "lightly", "FinetuneClassifier", _classifier("FinetuneClassifier"), _labelled, arguments=_features, objects=True
    ),
    Case(
        "deepforest",
        "deepforest",
        _forest,
        dict,
        arguments=_forest_arguments,
        objects=True,
        around=_random_retinanet,
    ),
    *(
        Case("chemprop", f"MPNN-{kind}", _mpnn(kind), _molecules, objects=True)
        for kind in ("BondMessagePassing", "AtomMessagePassing")
    ),
]
