"""Images of every kind are read alike, or refused by name; they are rotated as their EXIF orientation says."""

import gc
import os
import struct
import weakref

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_plugins.tasks import (
    DataError,
    HubImageDataModule,
    MaskFolderDataModule,
)
from lora_plugins.tasks.files import read_all, read_image, shown_size

from ..conftest import loaded, noise, write_image


def held_on_its_side(path):
    """A picture that is 20 high and 10 wide when it is shown: dark above, light below."""
    shown = np.zeros((20, 10, 3), dtype=np.uint8)
    shown[10:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown, what is stored has to be turned by a quarter, clockwise
    Image.fromarray(np.rot90(shown)).save(path, exif=exif)


def is_upright(image):
    return image.shape == (3, 20, 10) and bool(image[:, :8].max() < 0.1) and bool(image[:, 12:].min() > 0.9)


class TestPicturesOnTheirSide:
    def test_files(self, mask_folders):
        held_on_its_side(mask_folders / "images" / "val" / "0.jpg")
        write_image(mask_folders / "masks" / "val" / "0.png", np.zeros((20, 10), dtype=np.uint8))
        data = loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(20, 10)))
        assert is_upright(data.splits["val"][0]["image"])

    @pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_way_to_be_turned(self, tmp_path, orientation, ending):
        """As Pillow itself turns them; it turns a TIFF when it is read."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(noise(20, 10)).save(tmp_path / f"a.{ending}", exif=exif)
        with Image.open(tmp_path / f"a.{ending}") as image:
            image.load()
            expected = ImageOps.exif_transpose(image)
        assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{ending}")), np.asarray(expected))
        assert shown_size(tmp_path / f"a.{ending}") == expected.size

    def test_what_else_is_wrong_in_their_exif_does_not_matter(self, tmp_path):
        """Cameras write resolutions that Pillow reads, and cannot write: here a text."""
        tags = [(0x0112, 3, 1, struct.pack("<I", 6)), (0x011A, 2, 4, b"72\0\0")]
        entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
        Image.fromarray(noise(20, 10)).save(tmp_path / "a.jpg", exif=exif)
        assert read_image(tmp_path / "a.jpg").size == shown_size(tmp_path / "a.jpg") == (20, 10)

    def test_hugging_face(self, tmp_path):
        pytest.importorskip("datasets")
        for split in ("train", "validation"):
            for name in ("cat", "dog"):
                (tmp_path / "data" / split / name).mkdir(parents=True)
                held_on_its_side(tmp_path / "data" / split / name / "0.jpg")
        data = loaded(HubImageDataModule(str(tmp_path / "data"), image_size=(20, 10)))
        assert data.class_names == ["cat", "dog"]
        assert is_upright(data.splits["val"][0]["image"])


class TestRGB:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)

    @pytest.mark.parametrize("ending", ["png", "tif"])
    def test_16_bits_are_as_bright_as_8(self, tmp_path, ending):
        """Pillow by itself makes white of every value above 255."""
        Image.fromarray(self.gray.astype(np.uint16) * 257).save(tmp_path / f"a.{ending}")
        assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{ending}")), np.stack([self.gray] * 3, 2))

    def test_a_palette_of_transparent_colors_is_as_any_other(self, tmp_path):
        image = Image.fromarray(self.gray // 64).convert("P")
        image.putpalette([value for index in range(4) for value in (index, 50 * index, 7)])
        image.save(tmp_path / "a.png", transparency=bytes([0, 255, 100, 3]))
        expected = np.array([(index, 50 * index, 7) for index in range(4)], np.uint8)[self.gray // 64]
        assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)

    @pytest.mark.parametrize("kind", [np.int32, np.float32])
    def test_values_without_an_end_are_refused(self, tmp_path, kind):
        Image.fromarray(self.gray.astype(kind)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match=r"a\.tif holds 32-bit numbers .*8 or 16 bits"):
            read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", b"no image"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\x04IHDR\0\0\0\0abcd"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0dIHDR" + b"\0\1\0\0" * 2 + b"\x08\0\0\0\0"),
    ],
    ids=["text", "a ValueError", "more pixels than Pillow opens"],
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "resized_to", "size"),
    [
        ("it.jpg", None, (640, 480)),
        ("it.jpg", (130, 120), (640, 480)),
        ("it.jpg", (120, 120), (320, 240)),
        ("it.jpg", (20, 32), (160, 120)),
        ("it.jpg", (2, 2), (80, 60)),
        ("it.png", (20, 32), (640, 480)),
    ],
)
def test_a_jpeg_is_decoded_as_large_as_it_is_needed(tmp_path, name, resized_to, size):
    path = write_image(tmp_path / name, noise(480, 640))
    assert read_image(path, resized_to).size == size


def test_a_jpeg_on_its_side_is_decoded_as_large_as_it_is_needed(tmp_path):
    image = Image.fromarray(noise(480, 640))
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "it.jpg", exif=image.getexif())
    assert read_image(tmp_path / "it.jpg", (120, 20)).size == (240, 320)


def test_a_smaller_decoded_jpeg_shows_the_same(tmp_path):
    small = Image.fromarray(noise(12, 16)).resize((640, 480), Image.Resampling.BICUBIC)
    small.save(tmp_path / "it.jpg", quality=95)
    whole, part = (
        np.asarray(read_image(tmp_path / "it.jpg", size).resize((60, 60), Image.Resampling.BILINEAR)).astype(int)
        for size in (None, (60, 60))
    )
    assert np.abs(whole - part).max() <= 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
@pytest.mark.parametrize("read", [read_image, shown_size], ids=["read", "measured"])
def test_a_pipe_among_the_images_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png cannot be read: it is no regular file"):
        read(tmp_path / "a.png")


def test_what_to_do_with_an_image_that_is_too_large_is_said(tmp_path):
    Image.new("1", (16_000, 16_000)).save(tmp_path / "scene.png")
    with pytest.raises(DataError, match=r"scene\.png cannot be read: .*256000000 pixels.* Scale it down, or cut it"):
        read_image(tmp_path / "scene.png")


def tiff(bands):
    """One pixel of so many bands of 8 bits."""
    tags = {256: 1, 257: 1, 259: 1, 262: 1, 273: 8, 277: bands, 278: 1, 279: bands, 338: 0}
    entries = [(258, 3, bands, 500), *((tag, 4, 1, value) for tag, value in tags.items())]
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = struct.pack("<2sHI", b"II", 42, 8 + 64) + bytes(64) + struct.pack("<H", len(entries)) + table + bytes(4)
    return head.ljust(500, b"\0") + struct.pack(f"<{bands}H", *[8] * bands)


def test_what_to_do_with_bands_that_are_no_picture_is_said(tmp_path):
    """As scenes of satellites have them."""
    (tmp_path / "scene.tif").write_bytes(tiff(bands=12))
    with pytest.raises(
        DataError, match=r"scene\.tif cannot be read: .* more than four bands, write three as a picture"
    ):
        shown_size(tmp_path / "scene.tif")


def test_what_cannot_be_used_leaves_no_image_in_memory(tmp_path):
    """Of a folder of photos that are called masks, they would fill it."""
    write_image(tmp_path / "0.png", noise())
    images = []

    def read(path):
        image = read_image(path)
        images.append(weakref.ref(image))
        raise DataError("is no mask")

    found = [*read_all([tmp_path / "0.png"], read)]
    gc.collect()
    assert [str(each) for each in found] == ["is no mask"]
    assert images[0]() is None
