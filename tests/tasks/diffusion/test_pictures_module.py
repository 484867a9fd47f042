"""Pictures with prompts: where prompts come from, sizes, batches, and every bad input named."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.tasks import ClassPictures, DataError, PicturesDataModule
from lora_plugins.tasks.diffusion.buckets import bucket_sizes, fit, nearest_bucket
from tests.growth import calls


def batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


def prompts(data):
    return sorted(prompt for batch in batches(data) for prompt in batch.prompts)


def test_one_prompt_for_all(picture_folder):
    folder = picture_folder((8, 8), (8, 8), (8, 8))
    data = PicturesDataModule(str(folder), prompt="a sks dog", resolution=8, batch_size=2, repeats=2)
    found = batches(data)
    assert [len(batch.prompts) for batch in found] == [2, 2, 2]
    assert {prompt for batch in found for prompt in batch.prompts} == {"a sks dog"}
    assert sorted(name for batch in found for name in batch.names) == sorted(
        f"{folder / f'{number}.png'}@8x8" for number in range(3) for _ in range(2)
    )
    assert not any(bool(batch.is_class.any()) for batch in found)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_beside(picture_folder, encoding):
    folder = picture_folder((8, 8), (8, 8))
    for number in range(2):
        (folder / f"{number}.txt").write_text(f"a dog number {number}\n", encoding=encoding)
    assert prompts(PicturesDataModule(str(folder), resolution=8)) == ["a dog number 0", "a dog number 1"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_list(picture_folder, tmp_path, suffix):
    folder = picture_folder((8, 8), (8, 8))
    rows = {
        "csv": "image,prompt\n0.png,a dog\n1.png,a cat\n",
        "jsonl": '{"image": "0.png", "prompt": "a dog"}\n{"image": "1.png", "prompt": "a cat"}\n',
    }
    path = tmp_path / f"list.{suffix}"
    path.write_text(rows[suffix])
    assert prompts(PicturesDataModule(str(folder), samples=str(path), resolution=8)) == ["a cat", "a dog"]


def test_pictures_are_what_they_were():
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    pixels, sizes = fit(picture.convert("RGB"), (8, 8))
    torch.testing.assert_close(pixels[0], torch.arange(64).reshape(8, 8) * 4 / 255 * 2 - 1)
    assert sizes == (8, 8, 0, 0, 8, 8)


def test_pictures_cover_their_size_and_are_cut_in_the_middle():
    pixels, sizes = fit(Image.new("RGB", (40, 20), "red"), (10, 10))
    assert pixels.shape == (3, 10, 10)
    assert sizes == (20, 40, 0, 5, 10, 10)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (8, 4), (24, 8)])
def test_buckets_have_at_most_the_area(resolution, step):
    buckets = bucket_sizes(resolution, step)
    assert (resolution, resolution) in buckets
    for height, width in buckets:
        assert height * width <= resolution**2
        assert 0.5 <= height / width <= 2
        assert (height % step, width % step) == (0, 0) or height == width == resolution


def test_a_picture_goes_to_the_bucket_of_its_shape():
    buckets = bucket_sizes(512, 64)
    assert nearest_bucket((300, 300), buckets) == (512, 512)
    height, width = nearest_bucket((400, 800), buckets)
    assert (height, width) == (384, 640)
    assert nearest_bucket((800, 400), buckets) == (width, height)


def test_batches_are_of_one_bucket(picture_folder):
    folder = picture_folder((16, 16), (16, 32), (16, 32), (32, 16), (16, 16), (16, 16))
    data = PicturesDataModule(str(folder), prompt="a dog", resolution=16, buckets=True, bucket_step=4, batch_size=2)
    found = batches(data)
    assert len(found) == len(data.train_dataloader()) == 4
    assert sum(len(batch.names) for batch in found) == 6
    assert len({tuple(batch.pixels.shape[2:]) for batch in found}) == len(data.sizes) == 3


def test_each_picture_is_opened_once_and_each_size_has_its_bucket_looked_for_once(picture_folder, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source: opened.append(source) or real(source))
    data = PicturesDataModule(str(picture_folder(*[(16, 24)] * 20)), prompt="a dog", resolution=512, buckets=True)
    data.setup("fit")
    assert len(opened) == 20
    assert calls(data.train_dataloader) < 20 * len(bucket_sizes(512, 64))


def test_class_pictures_come_beside_and_have_the_size_of_their_subject(picture_folder):
    folder = picture_folder((16, 16), (16, 32))
    others = picture_folder((16, 16), (16, 16), (16, 16), name="class")
    for number in range(3):
        (others / f"{number}.txt").write_text("a dog")
    data = PicturesDataModule(
        str(folder),
        prompt="a sks dog",
        resolution=16,
        buckets=True,
        bucket_step=4,
        class_pictures=ClassPictures(str(others), ["a dog"], count=3, generate=False),
    )
    for batch in batches(data):
        assert batch.prompts == ["a sks dog", "a dog"]
        assert batch.is_class.tolist() == [False, True]
        assert batch.to("meta").pixels.device.type == "meta"
        assert batch.to("meta").is_class.tolist() == [False, True]  # asked for in each step: on the host, no wait
        assert torch.equal(batch.sizes[0, 4:], batch.sizes[1, 4:])


def test_mirrored_pictures_have_another_name(picture_folder):
    data = PicturesDataModule(
        str(picture_folder((8, 8))), prompt="a dog", resolution=8, repeats=40, random_flip=True, batch_size=40
    )
    (batch,) = batches(data)
    kinds = dict(zip(batch.names, batch.pixels, strict=True))
    plain, flipped = (kinds[name] for name in sorted(kinds))
    assert torch.equal(plain, flipped.flip(-1))
    assert all(torch.equal(kinds[name], pixels) for name, pixels in zip(batch.names, batch.pixels, strict=True))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        PicturesDataModule(str(tmp_path / "no"), prompt="a dog").setup("fit")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no image"):
        PicturesDataModule(str(tmp_path), prompt="a dog").setup("fit")


def test_pictures_one_folder_deeper_are_named(picture_folder):
    folder = picture_folder((8, 8))
    (folder / "10_sks dog").mkdir()  # as kohya's scripts want it
    (folder / "0.png").rename(folder / "10_sks dog" / "0.png")
    with pytest.raises(DataError, match=r"holds no image .*10_sks dog does: move them up"):
        PicturesDataModule(str(folder), prompt="a dog").setup("fit")


def test_pictures_that_are_left_out_are_named(picture_folder):
    folder = picture_folder((8, 8))
    others = ("0.txt", "1.txt", "metadata.jsonl", "0.npz", "README.md", "Thumbs.db", "desktop.ini")
    for name in ("0.NEF", "1.heic", "2.CR3", *others):  # the first one beside its 0.png
        (folder / name).write_text("a dog")
    with pytest.warns(
        UserWarning, match=r"has pictures in formats that are not read, .* left out: '1\.heic', '2\.CR3'\. Convert them"
    ):
        PicturesDataModule(str(folder)).setup("fit")


def test_a_caption_in_another_encoding_is_named(picture_folder):
    folder = picture_folder((8, 8), (8, 8))
    for name in ("0.txt", "1.txt"):
        (folder / name).write_text("Größe", encoding="utf-16")
    with pytest.raises(
        DataError, match=r"2 problems(.|\n)*0\.txt cannot be read: .* UTF-8(.|\n)*1\.txt cannot be read"
    ):
        PicturesDataModule(str(folder)).setup("fit")


def test_every_picture_that_cannot_be_read_is_named(picture_folder):
    folder = picture_folder((8, 8))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "short.jpg").write_bytes((folder / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"2 problems(.|\n)*broken\.png(.|\n)*short\.jpg"):
        PicturesDataModule(str(folder), prompt="a dog").setup("fit")


def test_a_missing_picture_of_a_list_is_named(picture_folder, tmp_path):
    (tmp_path / "list.csv").write_text("image,prompt\n0.png,a dog\nno.png,a cat\n")
    with pytest.raises(DataError, match=r"1 problem with the pictures of .*(.|\n)*no\.png"):
        PicturesDataModule(str(picture_folder((8, 8))), samples=str(tmp_path / "list.csv")).setup("fit")


def test_missing_and_empty_captions_are_named(picture_folder):
    folder = picture_folder((8, 8), (8, 8), (8, 8))
    (folder / "0.txt").write_text("a dog")
    (folder / "1.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"prompt of .*1\.png is empty(.|\n)*2\.png has no caption"):
        PicturesDataModule(str(folder)).setup("fit")


def test_captions_beside_a_prompt_for_all_are_named(picture_folder):
    folder = picture_folder((8, 8))
    (folder / "0.txt").write_text("a dog")
    with pytest.raises(DataError, match="captions beside"):
        PicturesDataModule(str(folder), prompt="a cat").setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "`prompt` is empty"),
        ({"prompt": "a", "samples": "list.csv"}, "Give one"),
        ({"repeats": 0}, "repeats is a whole number of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size is a whole number of at least 1, not 0"),
    ],
    ids=["empty prompt", "two sources", "repeats", "batch size"],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PicturesDataModule("folder", **arguments)
