"""The application: adapters that are replaced while they are asked for, and what is answered of what is wrong."""

import io
import shutil

import pytest
import torch
from PIL import Image

from lora_plugins import LoraModel
from lora_plugins.files import add_entry
from lora_plugins.tasks.inference import load_task
from lora_plugins.tasks.training import PROVENANCE_KEY

from .conftest import ask, encoded, picture, to

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")


def spoil(folder):
    """Writes NaN into a saved adapter, as a training that diverged does."""
    task = load_task(folder)
    with torch.no_grad():
        next(each for name, each in task.named_parameters() if "lora_B" in name).fill_(torch.nan)
    LoraModel(task.network).save_adapter(folder)
    add_entry(folder, PROVENANCE_KEY, {**task.provenance(), "target": "network"})


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
