"""The shelf: what is stored under a version is that version, and what cannot be loaded changes nothing."""

import shutil

import pytest
import torch

from benchmarks.serving.adapters import write_adapters, write_base
from lora_plugins.errors import AdapterFileError
from lora_plugins.files import MANIFEST
from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.inference import load_task
from tests.growth import calls
from tests.slow import slow_but

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


@pytest.mark.parametrize("problem", ["cut off", "on other weights"])
@pytest.mark.parametrize("limit", [2, 8], ids=["full", "with room"])
def test_what_cannot_be_loaded_changes_nothing(adapters, tmp_path, problem, limit):
    model = write_base(ImageClassificationTask, tiny_vit(depth=3), tmp_path / "deep.safetensors")
    write_adapters(ImageClassificationTask, model, adapters, ["deep"], **LABELS)
    if problem == "cut off":
        file = next(path for path in (adapters / "deep").iterdir() if path.name != MANIFEST)
        file.write_bytes(file.read_bytes()[:-20])
    else:
        task = ImageClassificationTask(model)
        torch.nn.init.ones_(task.network.blocks[0].attn.qkv.weight)
        save_network(task, tmp_path / "deep.safetensors")
    shelf = shelf_of(adapters, limit=limit)
    before = [logits(shelf, name) for name in ("birds", "boats")]
    size = shelf.bytes()
    with pytest.raises(AdapterFileError):
        shelf.load(shelf.describe("deep"))
    assert (shelf.loaded(), shelf.bytes()) == (["birds", "boats"], size)
    assert all(map(torch.equal, before, [logits(shelf, name) for name in ("birds", "boats")]))


def save_network(task, path):
    from safetensors.torch import save_file

    save_file(task.network.state_dict(), path)


def test_a_base_without_adapters_goes(adapters, others):
    shelf = shelf_of(adapters, limit=1)
    logits(shelf, "birds")
    size = shelf.bytes()
    shutil.copytree(others / "base", adapters / "deep")
    assert logits(shelf, "deep").shape == (2, 3)
    assert shelf.bytes() > size
    logits(shelf, "birds")
    assert (shelf.loaded(), shelf.bytes()) == (["birds"], size)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.02), (torch.float64, 1e-11)],  # logits are of the size of 1; bfloat16 has 8 bits
    ids=["bfloat16", "float64"],
)
@pytest.mark.parametrize("turned", slow_but([False, True], [True]), ids=["in order", "turned"])
def test_adapters_are_loaded_in_their_own_type_and_cast_then(tmp_path, dtype, tolerance, turned):
    """Some are checked against the base bit for bit, which a cast one would not pass."""
    base = write_base(ImageClassificationTask, tiny_vit(), tmp_path / "vit.safetensors")
    stored = {"quantize": "nf4", "quantize_options": {"min_size": 0}}
    kinds = {"pissa": {"init": "pissa"}, "nf4": stored, "both": {"init": "pissa", **stored}, "plain": LABELS}
    names = [f"{kind}{at}" for at in range(2) for kind in kinds]
    for kind, fields in kinds.items():
        options = {"r": 2, "target_modules": ["qkv"], **fields}
        write_adapters(ImageClassificationTask, base, tmp_path / "adapters", [f"{kind}0", f"{kind}1"], **options)
    shelf = shelf_of(tmp_path / "adapters", dtype=dtype)
    for name in [*(names[::-1] if turned else names), *names]:
        found = logits(shelf, name)
        assert found.dtype == dtype
        torch.testing.assert_close(found, alone(tmp_path / "adapters" / name, dtype), rtol=0, atol=tolerance)


def test_describing_an_adapter_again_costs_the_same_among_many(adapters):
    shelf = shelf_of(adapters)
    name = shelf.names()[0]
    shelf.describe(name)
    among_few = calls(lambda: shelf.describe(name))
    for number in range(100):
        shutil.copytree(adapters / name, adapters / f"copy {number}")
    shelf.describe("copy 0")
    assert calls(lambda: shelf.describe(name)) < among_few + 50
