"""The application: adapters that are replaced while they are asked for, and what is answered of what is wrong."""

import asyncio
import csv
import io
import json
import shutil
import threading
import time

import pytest
import torch
from PIL import Image

from benchmarks.serving.adapters import add_provenance, write_adapters, write_base
from lora_plugins import LoraModel
from lora_plugins.files import MANIFEST
from lora_plugins.tasks import ImageClassificationTask, SemanticSegmentationTask
from lora_plugins.tasks.inference import label_probabilities, load_task, predict_folder
from lora_plugins.tasks.inference.predict import COLUMNS
from lora_plugins.tasks.training import PROVENANCE_KEY
from tests.core.file_cases import manifest_of, write_manifest

from ..conftest import tiny_segformer, tiny_vit
from .conftest import LABELS, MASKS, ask, encoded, picture, tensor, to

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")


@pytest.fixture
def five(adapters):
    """An adapter of five classes, beside those that are served."""
    base = write_base(ImageClassificationTask, tiny_vit(5), adapters.parent / "five.safetensors")
    write_adapters(ImageClassificationTask, base, adapters.parent, ["five"], **LABELS)
    return adapters.parent / "five"


def during(action):
    """The parts of an image; between them, when its adapter is known already, something happens."""

    async def parts():
        whole = encoded(picture())
        yield whole[:50]
        await asyncio.to_thread(action)
        yield whole[50:]

    return parts()


def expected(path):
    return pytest.approx(label_probabilities(load_task(path), tensor(picture())).tolist(), rel=1e-4, abs=1e-5)


def swap(source, place, gap=0.0):
    """Puts a folder in the place of another one, as one does with mv, some seconds after that one is gone."""
    shutil.copytree(source, place.parent.parent / "new")
    place.rename(place.parent.parent / "old")
    time.sleep(gap)
    (place.parent.parent / "new").rename(place)
    shutil.rmtree(place.parent.parent / "old")


def test_what_is_replaced_during_a_request_is_answered_by_the_new_one(adapters, five, serve):
    (answer,) = ask(serve(adapters), [(to("birds"), during(lambda: swap(five, adapters / "birds")))])
    assert answer.status_code == 200, answer.text
    assert [*answer.json()["probabilities"].values()] == expected(five)


def test_what_is_removed_during_a_request_is_unknown(adapters, serve):
    (answer,) = ask(serve(adapters), [(to("birds"), during(lambda: shutil.rmtree(adapters / "birds")))])
    assert (answer.status_code, "Unknown adapter 'birds'" in answer.text) == (404, True)


@pytest.mark.parametrize("part", ["folder", "manifest"])
def test_what_is_away_for_a_moment_is_waited_for(adapters, serve, part):
    place = adapters / "birds" if part == "folder" else adapters / "birds" / MANIFEST
    away, engine = adapters.parent / "away", serve(adapters)
    assert "birds" in engine.shelf.names()
    place.rename(away)
    threading.Timer(0.02, lambda: away.rename(place)).start()
    (answer,) = ask(engine, [(to("birds"), encoded(picture()))])
    assert answer.status_code == 200, answer.text


def test_an_adapter_whose_model_is_not_here_is_not_called_unknown(adapters, serve):
    provenance = json.loads((adapters / "birds" / MANIFEST).read_text())[PROVENANCE_KEY]
    provenance["arguments"]["model"]["name"] = "vit_of_tomorrow"
    add_provenance(adapters / "birds", provenance)
    (answer,) = ask(serve(adapters), [(to("birds"), encoded(picture()))])
    assert (answer.status_code, "vit_of_tomorrow" in answer.text) == (422, True)


def test_an_adapter_whose_words_cannot_be_built(adapters, serve):
    provenance = json.loads((adapters / "birds" / MANIFEST).read_text())[PROVENANCE_KEY]
    provenance["arguments"]["of_tomorrow"] = 3
    add_provenance(adapters / "birds", provenance)
    (answer,) = ask(serve(adapters), [(to("birds"), encoded(picture()))])
    assert (answer.status_code, "says of its task what cannot be built" in answer.text) == (422, True)


def test_requests_while_folders_are_replaced(adapters, five, serve):
    """All are answered, each by one of both."""
    engine, first = serve(adapters), shutil.copytree(adapters / "birds", adapters.parent / "first")
    both, ended = [expected(first), expected(five)], threading.Event()
    assert "birds" in engine.shelf.names()

    def replace():
        while not ended.is_set():
            for source in (five, first):
                ended.wait(0.05)
                swap(source, adapters / "birds", gap=0.01)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        answers = [each for _ in range(12) for each in ask(engine, [(to("birds"), encoded(picture()))] * 4)]
    finally:
        ended.set()
        thread.join()
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    assert all([*answer.json()["probabilities"].values()] in both for answer in answers)


def spoil(folder):
    """Writes NaN into a saved adapter, as a training that diverged does."""
    task = load_task(folder)
    with torch.no_grad():
        next(each for name, each in task.named_parameters() if "lora_B" in name).fill_(torch.nan)
    LoraModel(task.network).save_adapter(folder)
    add_provenance(folder, {**task.provenance(), "target": "network"})


@pytest.mark.parametrize(("folder", "bad", "good"), [("written", "birds", "boats"), ("segmenters", "roads", "roofs")])
def test_an_adapter_of_nan_is_named_and_spoils_no_other(request, tmp_path, serve, folder, bad, good):
    adapters = shutil.copytree(request.getfixturevalue(folder), tmp_path / "adapters")
    spoil(adapters / bad)
    body = encoded(picture(size=(64, 96)))
    answers = ask(serve(adapters, wait=0.2), [(to(name), body) for name in (bad, good)])
    assert [answer.status_code for answer in answers] == [422, 200]
    assert f"The adapter {bad!r} answers with NaN" in answers[0].json()["detail"]
    alone = ask(serve(adapters), [(to(good), body)])
    assert answers[1].headers["content-type"] == alone[0].headers["content-type"]


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["Pillow warns", "Pillow refuses"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_is_beyond_pillows_limit_is_too_large(written, serve, side):
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    (answer,) = ask(serve(written), [(to("birds"), out.getvalue())])
    assert (answer.status_code, "more" in answer.text, "pixels" in answer.text) == (413, True, True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "DDS"])
def test_an_image_that_is_cut_off_cannot_be_read(written, serve, kind):
    """Decoders raise several kinds of errors."""
    out = io.BytesIO()
    Image.fromarray(picture()).save(out, kind)
    whole = out.getvalue()
    answers = ask(serve(written), [(to("birds"), whole[: len(whole) * part // 8]) for part in (1, 4, 6)])
    assert [answer.status_code for answer in answers] == [400] * 3
    assert all("the image cannot be read" in answer.text for answer in answers)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"class": "x", "arguments": {}}, "no task that can be served"),
        ({"class": "x", "arguments": []}, "no task that can be served"),
        ({"class": "lora_plugins.tasks.ranking.RankingTask"}, "the version that its run had"),
    ],
    ids=["no model", "no arguments", "another version"],
)
def test_a_folder_that_cannot_be_served_does_not_hide_the_others(adapters, serve, told, said):
    from fastapi.testclient import TestClient

    from lora_plugins.tasks.serving import make_app

    manifest = manifest_of(adapters / "birds")
    write_manifest(adapters / "birds", {**manifest, PROVENANCE_KEY: {**manifest[PROVENANCE_KEY], **told}})
    with TestClient(make_app(serve(adapters))) as client:
        listed = {each.pop("name"): each for each in client.get("/adapters").json()}
        assert said in listed["birds"]["problem"]
        assert listed["boats"]["classes"] == ["0", "1", "2"]
        assert client.post(to("birds"), content=encoded(picture())).status_code == 422


def test_more_classes_than_a_mask_holds_are_told(tmp_path, serve):
    base = write_base(SemanticSegmentationTask, tiny_segformer(257), tmp_path / "segformer.safetensors")
    write_adapters(SemanticSegmentationTask, base, tmp_path / "adapters", ["many"], **MASKS)
    (answer,) = ask(serve(tmp_path / "adapters"), [(to("many"), encoded(picture(size=(64, 64))))])
    assert (answer.status_code, "257 classes; an 8-bit mask holds at most 256" in answer.text) == (422, True)


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_a_large_jpeg_is_answered_as_by_predict(request, tmp_path, serve, kind):
    folder, name = {"labels": ("written", "birds"), "masks": ("segmenters", "roads")}[kind]
    adapters, photo = request.getfixturevalue(folder), tmp_path / "photo.jpg"
    Image.fromarray(picture(size=(480, 640))).save(photo)
    predict_folder(load_task(adapters / name), photo, tmp_path / "out")
    (answer,) = ask(serve(adapters), [(to(name), photo.read_bytes())])
    if kind == "labels":
        (row,) = csv.DictReader((tmp_path / "out" / "labels.csv").read_text().splitlines())
        expected = {key: float(value) for key, value in row.items() if key not in COLUMNS}
        assert answer.json()["probabilities"] == pytest.approx(expected, abs=1e-5)
    else:
        mask = Image.open(io.BytesIO(answer.content))
        assert mask.tobytes() == Image.open(tmp_path / "out" / "masks" / "photo.png").tobytes()


def test_a_program_is_not_run(adapters, serve):
    """Pillow gives PostScript to Ghostscript, where that is installed."""
    program = io.BytesIO()
    Image.fromarray(picture()).save(program, "EPS")
    (answer,) = ask(serve(adapters), [(to("birds"), program.getvalue())])
    assert (answer.status_code, "of the format EPS, which is a program" in answer.text) == (400, True)


def test_who_goes_away_while_sending_is_no_error_of_the_server(adapters, serve):
    messages = iter([{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": to("birds"), "headers": [], "query_string": b""}
    from lora_plugins.tasks.serving import make_app

    asyncio.run(make_app(serve(adapters))(scope, receive, send))
    assert sent[0]["status"] == 400


def test_the_description_says_what_to_send_and_what_is_answered(written, serve):
    """The page /docs, of which the command prints the address, offers a file to send by it."""
    from lora_plugins.tasks.serving import make_app

    described = make_app(serve(written)).openapi()["paths"]["/adapters/{name}/predict"]["post"]
    assert described["requestBody"]["content"]["application/octet-stream"]["schema"]["format"] == "binary"
    assert {*described["responses"]} == {"200", "400", "404", "413", "422", "503"}
    assert {*described["responses"]["200"]["content"]} == {"application/json", "image/png"}
    of_errors = described["responses"]["422"]["content"]["application/json"]["schema"]
    assert of_errors["properties"] == {"detail": {"type": "string"}}
