"""What the tests of the server share: adapters on disk, engines, and requests."""

import asyncio
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.serving.adapters import write_adapters, write_base
from lora_plugins.tasks import ImageClassificationTask, SemanticSegmentationTask

from ..conftest import tiny_segformer, tiny_vit

LABELS = {"r": 2, "target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}
MASKS = {"r": 2, "target_modules": "all", "modules_to_save": ["decode_head.classifier"]}
NAMES = ["birds", "boats", "cars.v2", "no_head"]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A folder of classifiers' adapters."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "adapters").mkdir()
    base = write_base(ImageClassificationTask, tiny_vit(), folder / "vit.safetensors")
    write_adapters(ImageClassificationTask, base, folder / "adapters", NAMES[:3], **LABELS)
    write_adapters(ImageClassificationTask, base, folder / "adapters", ["no_head"], r=3, target_modules=["fc2"])
    write_adapters(
        ImageClassificationTask, base, folder / "adapters", ["dora"], r=1, target_modules=["proj"], variant="dora"
    )
    return folder / "adapters"


@pytest.fixture(scope="session")
def segmenters(tmp_path_factory):
    """A folder of segmenters' adapters."""
    folder = tmp_path_factory.mktemp("segmenters")
    base = write_base(SemanticSegmentationTask, tiny_segformer(), folder / "segformer.safetensors")
    write_adapters(SemanticSegmentationTask, base, folder / "adapters", ["roads", "roofs"], **MASKS)
    return folder / "adapters"


@pytest.fixture
def adapters(written, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(written, tmp_path / "adapters")


@pytest.fixture
def serve():
    """Makes engines, which are closed afterwards."""
    from lora_plugins.tasks.serving import Engine, Shelf

    engines = []

    def make(folder, limit=8, dtype=torch.float32, **options):
        engines.append(Engine(Shelf(folder, limit=limit, dtype=dtype), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def picture(seed=0, size=(21, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def ask(engine, requests, **options):
    """Sends all requests at once: pairs of a path and a body, or its parts."""
    import httpx

    from lora_plugins.tasks.serving import make_app

    async def run():
        transport = httpx.ASGITransport(make_app(engine, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.gather(*(client.post(path, content=body) for path, body in requests))

    return asyncio.run(run())


def to(name):
    return f"/adapters/{name}/predict"
