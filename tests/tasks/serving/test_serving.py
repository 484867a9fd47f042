"""The server: every answer is what the adapter alone gives, whatever is asked for beside it."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.serving.adapters import add_provenance, write_adapters, write_base
from lora_plugins.files import MANIFEST
from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.inference import label_probabilities, load_task, mask_probabilities, resized

from ..conftest import tiny_vit
from .conftest import NAMES, ask, encoded, picture, tensor, to

pytest.importorskip("httpx")
pytest.importorskip("fastapi")


@pytest.mark.parametrize("limit", [8, 2, 1])
def test_parallel_requests_are_answered_as_by_their_adapters_alone(written, serve, limit):
    engine = serve(written, limit=limit, wait=0.2)
    asked = [([*NAMES, "dora"][at % 5], picture(at)) for at in range(32)]
    answers = ask(engine, [(to(name), encoded(pixels)) for name, pixels in asked])
    tasks = {name: load_task(written / name) for name in [*NAMES, "dora"]}
    for (name, pixels), answer in zip(asked, answers, strict=True):
        expected = label_probabilities(tasks[name], tensor(pixels))
        found = answer.json()
        assert (answer.status_code, found["adapter"]) == (200, name)
        assert found["label"] == str(int(expected.argmax()))
        torch.testing.assert_close(torch.tensor([*found["probabilities"].values()]), expected, rtol=1e-4, atol=1e-5)
    assert len(engine.shelf.loaded()) <= limit


def test_a_mixed_batch_is_exact(written, serve):
    engine = serve(written, dtype=torch.float64, wait=0.5)
    images = {at: tensor(picture(at)) for at in range(12)}
    described = {name: engine.shelf.describe(name) for name in NAMES}
    asked = [(NAMES[at % 4], at) for at in images]
    waiting = []
    for name, at in asked:
        provenance = described[name].provenance
        image = resized(images[at], provenance["image_size"], provenance["interpolation"])
        waiting.append((name, image, engine.submit(described[name], image)))
    tasks = {name: load_task(written / name).double() for name in NAMES}
    with torch.inference_mode():
        for name, image, answer in waiting:
            expected = tasks[name](image[None].double())[0]
            torch.testing.assert_close(answer.result(30), expected, rtol=1e-11, atol=1e-11)
    assert engine.batches < len(asked)


def test_bases_that_are_stored_in_several_ways(tmp_path, serve):
    """In any order; those that are stored alike are one."""
    base = write_base(ImageClassificationTask, tiny_vit(), tmp_path / "vit.safetensors")
    (tmp_path / "adapters").mkdir()
    for name, storage in (("float", None), ("nf4", "nf4"), ("int8", "int8"), ("another", "nf4")):
        options = {} if storage is None else {"quantize": storage, "quantize_options": {"min_size": 0}}
        write_adapters(
            ImageClassificationTask, base, tmp_path / "adapters", [name], r=2, target_modules=["qkv"], **options
        )
    names, image = ["int8", "float", "nf4", "another"], tensor(picture(size=(16, 16)))
    tasks = {name: load_task(tmp_path / "adapters" / name) for name in names}
    for order in (names, names[::-1]):
        engine = serve(tmp_path / "adapters", wait=0.0)
        for name in order:
            answer = engine.submit(engine.shelf.describe(name), image).result(30)
            torch.testing.assert_close(answer, tasks[name](image[None])[0].detach())
        assert len({engine.shelf.describe(name).base for name in names}) == 3


def test_bases_whose_images_are_normalized_in_several_ways(adapters, serve):
    """As before and after a change of what a library, or the folder of a model, says of its images."""
    said = json.loads((adapters / "boats" / MANIFEST).read_text())["task"]
    add_provenance(adapters / "boats", said | {"mean": [0.1, 0.2, 0.3]})
    engine, image = serve(adapters), tensor(picture(size=(16, 16)))
    for name in ("birds", "boats", "cars.v2"):
        answer = engine.submit(engine.shelf.describe(name), image).result(30)
        torch.testing.assert_close(answer, load_task(adapters / name)(image[None])[0].detach())
    assert len({engine.shelf.describe(name).base for name in ("birds", "boats", "cars.v2")}) == 2


def test_masks(segmenters, serve):
    asked = [(["roads", "roofs"][at % 2], picture(at, (64, 96))) for at in range(6)]
    answers = ask(serve(segmenters, wait=0.2), [(to(name), encoded(pixels)) for name, pixels in asked])
    for (name, pixels), answer in zip(asked, answers, strict=True):
        assert answer.headers["content-type"] == "image/png"
        mask = np.asarray(Image.open(io.BytesIO(answer.content)))
        expected = mask_probabilities(load_task(segmenters / name), tensor(pixels))
        near = (expected.topk(2, 0).values.diff(dim=0).abs() < 1e-4)[0].numpy()
        assert ((mask == expected.argmax(0).numpy()) | near).all()


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (to("bird"), "image", 404, "Unknown adapter 'bird'. Did you mean 'birds'"),
        (to("..%2Fadapters%2Fbirds"), "image", 404, ""),
        (to(".."), "image", 404, ""),
        (to("%2Ftmp"), "image", 404, ""),
        (to("."), "image", 404, ""),
        (to("birds"), "text", 400, "send an encoded image"),
        (to("birds"), "half", 400, "the image cannot be read"),
        (to("birds"), "nothing", 400, "send an encoded image"),
        (to("birds"), "long", 413, "more than the 4096 bytes"),
        (to("birds"), "wide", 413, "10000 pixels, more than the 5000"),
    ],
    ids=["near", "up", "dots", "root", "here", "text", "half", "nothing", "long", "wide"],
)
def test_what_is_refused(written, serve, path, body, status, message):
    whole = encoded(picture())
    bodies = {
        "image": whole,
        "text": b"no image",
        "half": whole[: len(whole) // 2],
        "nothing": b"",
        "long": encoded(picture(size=(60, 60))),
        "wide": encoded(np.zeros((10, 1000, 3), np.uint8)),
    }
    engine = serve(written)
    refused, good = ask(engine, [(path, bodies[body]), (to("birds"), whole)], max_bytes=4096, max_pixels=5000)
    assert refused.status_code == status
    assert message in refused.text
    assert good.status_code == 200


def test_an_adapter_that_is_removed_or_damaged(adapters, serve):
    engine, body = serve(adapters, limit=2), encoded(picture())
    described = engine.shelf.describe("boats")
    damaged = next(path for path in (adapters / "cars.v2").iterdir() if path.name != MANIFEST)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    shutil.rmtree(adapters / "boats")
    gone = engine.submit(described, torch.rand(3, 16, 16))  # it was there when the request came
    assert gone.exception(30) is not None
    answers = ask(engine, [(to(name), body) for name in ("boats", "cars.v2", "birds")])
    assert [answer.status_code for answer in answers] == [404, 422, 200]
    shutil.rmtree(adapters / "birds")
    assert engine.submit(engine.shelf.describe("no_head"), torch.rand(3, 16, 16)).result(30).shape == (3,)


def test_who_gave_up_stops_nobody_else(adapters, serve):
    engine = serve(adapters, wait=0.5)
    described = engine.shelf.describe("boats")
    shutil.rmtree(adapters / "boats")
    with ThreadPoolExecutor(2) as threads:
        given_up, other = threads.map(
            lambda each: engine.submit(each, torch.rand(3, 16, 16)), (described, engine.shelf.describe("birds"))
        )
    assert given_up.cancel()
    assert other.result(30).shape == (3,)


def test_a_new_version_of_an_adapter_takes_its_place(adapters, serve):
    engine, body = serve(adapters), encoded(picture())
    before, other = (answer.json() for answer in ask(engine, [(to(name), body) for name in ("birds", "boats")]))
    shutil.rmtree(adapters / "birds")
    shutil.copytree(adapters / "boats", adapters / "birds")
    (after,) = (answer.json() for answer in ask(engine, [(to("birds"), body)]))
    assert after["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert after["probabilities"] != pytest.approx(before["probabilities"], abs=1e-5)


def test_the_list(adapters, serve):
    from fastapi.testclient import TestClient

    from lora_plugins.tasks.serving import make_app

    (adapters / "broken").mkdir()
    (adapters / "broken" / MANIFEST).write_text("{")
    with TestClient(make_app(serve(adapters))) as client:
        assert client.get("/health").json() == {"status": "ok"}
        listed = {each.pop("name"): each for each in client.get("/adapters").json()}
        assert listed["birds"] == {
            "task": "ImageClassificationTask", "classes": ["0", "1", "2"], "loaded": False
        }  # fmt: skip
        assert "cannot be read" in listed["broken"]["problem"]
        client.post(to("birds"), content=encoded(picture()))
        assert {each["name"]: each.get("loaded") for each in client.get("/adapters").json()}["birds"]


def test_the_end_answers_what_waits(written, serve):
    engine = serve(written, wait=0.0)
    described = engine.shelf.describe("birds")
    with ThreadPoolExecutor(4) as threads:
        waiting = [*threads.map(lambda _: engine.submit(described, torch.rand(3, 16, 16)), range(40))]
        engine.close()
    assert all(answer.result(0).shape == (3,) for answer in waiting)
    (answer,) = ask(engine, [(to("birds"), encoded(picture()))])
    assert (answer.status_code, "shutting down" in answer.text) == (503, True)


def test_too_many_that_wait_are_refused(written, serve):
    engine = serve(written, max_waiting=2, max_batch=1)
    body = encoded(picture())
    codes = {answer.status_code for answer in ask(engine, [(to("birds"), body)] * 40)}
    assert codes == {200, 503}
