"""The application: adapters that are replaced while they are asked for, and what is answered of what is wrong."""

import io

import pytest
from PIL import Image

from .conftest import ask, picture, to

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")


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
