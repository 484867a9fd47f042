"""The shelf: what is stored under a version is that version, and what cannot be loaded changes nothing."""

import shutil

import pytest
import torch

from benchmarks.serving.adapters import write_adapters, write_base
from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.inference import load_task

from ..conftest import tiny_vit
from .conftest import LABELS

pytest.importorskip("fastapi")

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Adapters of other classes and of another base than those that are served."""
    folder = tmp_path_factory.mktemp("others")
    for name, model in (("classes", tiny_vit(5)), ("base", tiny_vit(depth=3))):
        base = write_base(ImageClassificationTask, model, folder / f"{name}.safetensors")
        write_adapters(ImageClassificationTask, base, folder, [name], **LABELS)
    return folder


def shelf_of(folder, **options):
    from lora_plugins.tasks.serving import Shelf

    return Shelf(folder, **options)


def put(source, place):
    shutil.rmtree(place)
    shutil.copytree(source, place)


def logits(shelf, name, images=IMAGES):
    described = shelf.describe(name)
    shelf.load(described)
    return shelf.logits([described] * len(images), images)


def alone(path, dtype=torch.float32):
    """What an adapter gives without a server."""
    with torch.no_grad():
        return load_task(path).to(dtype)(IMAGES.to(dtype))


@pytest.mark.parametrize("other", ["boats", "classes", "base"])
def test_what_was_described_is_loaded_or_nothing_is(adapters, others, other):
    from lora_plugins.tasks.serving import ReplacedError

    shelf, first = shelf_of(adapters), shutil.copytree(adapters / "birds", adapters.parent / "first")
    replacing = others / other if (others / other).exists() else adapters / other
    described = shelf.describe("birds")
    put(replacing, adapters / "birds")
    with pytest.raises(ReplacedError, match="'birds' was replaced or removed"):
        shelf.load(described)
    assert (shelf.loaded(), shelf.bytes()) == ([], 0)
    torch.testing.assert_close(logits(shelf, "birds"), alone(replacing))
    put(first, adapters / "birds")
    torch.testing.assert_close(logits(shelf, "birds"), alone(first))


def test_what_was_removed_is_not_loaded(adapters):
    from lora_plugins.tasks.serving import ReplacedError

    shelf = shelf_of(adapters)
    described = shelf.describe("birds")
    shutil.rmtree(adapters / "birds")
    with pytest.raises(ReplacedError):
        shelf.load(described)
