"""The command that predicts for a folder of images."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_plugins import LoraConfig
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import DataError, ImageClassificationTask, ImageFolderDataModule
from lora_plugins.tasks.inference import load_task, mask_probabilities, predict_folder
from lora_plugins.tasks.segmentation import class_colors

from ..conftest import noise, tiny_vit, write_image
from .conftest import FILES


def predict(arguments):
    return main(["predict", *arguments])


@pytest.mark.parametrize(
    ("resized", "suffix"),
    [({"image_size": (24, 16)}, "png"), ({"interpolation": "nearest"}, "png"), ({"image_size": (16, 16)}, "jpg")],
    ids=["size", "interpolation", "larger JPEGs"],
)
def test_images_are_resized_as_those_of_the_fit(trainer, tmp_path, resized, suffix):
    """In memory, from files, and in the validation alike."""
    for number in range(8):
        place = tmp_path / "data" / ("train", "val")[number % 2] / ("a", "b")[number // 2 % 2]
        write_image(place / f"{number}.{suffix}", noise(140, 130, seed=number))
    task = ImageClassificationTask(tiny_vit(2, dynamic_img_size=True), lr=0.05)
    data = ImageFolderDataModule(str(tmp_path / "data"), batch_size=4, **resized)
    merged, checkpoint = str(tmp_path / "merged.safetensors"), str(tmp_path / "merged.ckpt")
    run = trainer(max_epochs=3, callbacks=[LoraCallback(LoraConfig(r=2), target="network", export_to=merged)])
    run.fit(task, data)
    run.save_checkpoint(checkpoint, weights_only=True)
    task.eval()
    with torch.no_grad():
        expected = [task(sample["image"][None]).softmax(1)[0] for sample in data.splits["val"]]
    again = ImageClassificationTask.load_from_checkpoint(checkpoint, weights_only=True).eval()
    for name, each in {"memory": task, "file": load_task(merged), "checkpoint": again}.items():
        images = [str(tmp_path / "data" / "val" / label) for label in data.class_names]
        (table,) = predict_folder(each, images, tmp_path / name)
        rows = list(csv.DictReader(table.read_text().splitlines()))
        found = [torch.tensor([float(row[label]) for label in data.class_names]) for row in rows]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)  # of which a table has six digits


class TestPredict:
    @pytest.mark.parametrize("file", FILES)
    def test_labels(self, fitted, tmp_path, file, capsys):
        task, files = fitted["labels"]
        for i, size in enumerate(((20, 24), (90, 33))):
            write_image(tmp_path / "images" / f"{i}.png", noise(*size, seed=i))
        task.image_size = (16, 16)
        assert predict([str(files[file]), str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--flips"]) == 0
        rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").read_text().splitlines()))
        assert [row["image"] for row in rows] == ["0.png", "1.png"]
        for row in rows:
            shares = [float(row[name]) for name in task.class_names]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert task.class_names[int(np.argmax(shares))] == row["label"]

    def test_a_class_with_the_name_of_a_column(self, tmp_path):
        names = ["image", "label", "probability", "cat"]
        task = ImageClassificationTask(tiny_vit(4), class_names=names).eval()
        write_image(tmp_path / "it.png", noise())
        (file,) = predict_folder(task, tmp_path / "it.png", tmp_path / "out")
        (row,) = csv.DictReader(file.read_text().splitlines())
        shares = [float(row[name]) for name in (*(f"probability of {name}" for name in names[:3]), "cat")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert (row["image"], row["label"]) == ("it.png", names[int(np.argmax(shares))])

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize(
        ("options", "meant"),
        [
            ([], {}),
            (
                ["--window", "64", "64", "--overlap", "0.5", "--flips"],
                {"window": (64, 64), "overlap": 0.5, "flips": True},
            ),
        ],
        ids=["whole", "windows and flips"],
    )
    def test_masks(self, fitted, tmp_path, file, options, meant):
        task, files = fitted["masks"]
        sizes = {"a": (150, 100), "b": (30, 70)}
        for name, size in sizes.items():
            write_image(tmp_path / "images" / f"{name}.png", noise(*size))
        assert predict([str(files[file]), str(tmp_path / "images"), "--out", str(tmp_path / "out"), *options]) == 0
        task.image_size = (64, 64)
        for name, (height, width) in sizes.items():
            image = torch.from_numpy(noise(height, width)).permute(2, 0, 1).float() / 255
            expected = mask_probabilities(task, image, **meant).argmax(0).numpy()
            with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as mask:
                assert (mask.mode, mask.size) == ("P", (width, height))
                assert len(np.unique(expected)) > 1
                assert (np.asarray(mask) == expected).mean() > 0.999  # except for ties that a merge decides otherwise
                assert mask.getpalette()[: 3 * len(task.class_names)] == class_colors(4).ravel().tolist()
            with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as picture:
                assert (picture.mode, picture.size) == ("RGB", (width, height))

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("labels", ["--window", "8", "8"], "A window is for masks"),
            ("masks", ["--window", "64", "64", "--overlap", "1"], "share of the window"),
            ("masks", ["--overlap", "0.5"], "--overlap is that of windows. Say --window HEIGHT WIDTH too"),
            ("labels", ["--out", __file__], "which is a file. Name a folder."),
            ("labels", ["--device", "gpu7"], "--device is 'gpu7', which torch cannot use here"),
        ],
        ids=["window of labels", "overlap", "overlap without a window", "out", "device"],
    )
    def test_options_that_cannot_be(self, fitted, tmp_path, capsys, kind, options, message):
        write_image(tmp_path / "images" / "a.png", noise())
        files = [str(fitted[kind][1]["merged"]), str(tmp_path / "images"), "--out", str(tmp_path / "out")]
        assert predict([*files, *options]) == 1
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["images"]

    def test_a_window_of_nothing_is_no_argument(self, capsys):
        assert predict(["model", "images", "--window", "0", "8"]) == 1
        assert "argument --window: '0' is not a whole number of at least 1" in capsys.readouterr().err

    def test_images_that_cannot_be_read(self, fitted, tmp_path, capsys):
        write_image(tmp_path / "images" / "b.png", noise())
        for name in ("a", "c"):
            (tmp_path / "images" / f"{name}.png").write_bytes(b"no picture")
        files = [str(fitted["labels"][1]["merged"]), str(tmp_path / "images"), "--out", str(tmp_path / "out")]
        assert predict(files) == 1
        said = capsys.readouterr().err
        assert "2 of 3 images cannot be read" in said
        assert "a.png" in said
        assert "c.png" in said
        assert not (tmp_path / "out").exists()
        with pytest.warns(UserWarning, match="2 of 3 images"):
            assert predict([*files, "--skip"]) == 0
        assert (tmp_path / "out" / "labels.csv").read_text().count("\n") == 2

    def test_images_of_which_none_is_left(self, fitted, tmp_path, capsys):
        broken = tmp_path / "a.png"
        broken.write_bytes(b"no picture")
        files = [str(fitted["labels"][1]["merged"]), str(broken), "--out", str(tmp_path / "out")]
        assert predict([*files, "--skip"]) == 1
        said = capsys.readouterr().err
        assert "1 of 1 images cannot be read" in said
        assert "--skip" not in said

    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_all_images_are_read_before_the_first_prediction(self, fitted, tmp_path, kind):
        """Or else hours of predictions would be lost at the last image."""
        write_image(tmp_path / "images" / "a.png", noise())
        (tmp_path / "images" / "b.png").write_bytes(b"no picture")
        task, predicted = fitted[kind][0], []
        hook = task.register_forward_hook(lambda *_: predicted.append(True))
        with hook, pytest.raises(DataError, match="1 of 2 images cannot be read"):
            predict_folder(task, tmp_path / "images", tmp_path / "out")
        assert not predicted

    @pytest.mark.parametrize(
        ("kind", "name", "content"),
        [
            pytest.param("labels", "labels.csv", b"image,label\na.png,cat\n", id="true labels"),
            pytest.param("labels", "labels.csv", b"\xff\xfe", id="a table in another coding"),
            pytest.param("masks", "masks/a.png", b"a true mask", id="true masks"),
        ],
    )
    def test_what_is_true_is_not_replaced(self, fitted, tmp_path, capsys, kind, name, content):
        """A folder of data has the names of results."""
        write_image(tmp_path / "images" / "a.png", noise())
        truth = tmp_path / name
        truth.parent.mkdir(exist_ok=True)
        truth.write_bytes(content)
        files = [str(fitted[kind][1]["merged"]), str(tmp_path / "images"), "--out"]
        assert predict([*files, str(tmp_path)]) == 1
        assert f"{truth} is there already, and is no prediction" in capsys.readouterr().err
        assert truth.read_bytes() == content
        assert not (tmp_path / "overlays").exists()

    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_predictions_are_replaced(self, fitted, tmp_path, kind):
        write_image(tmp_path / "images" / "a.png", noise())
        files = [str(fitted[kind][1]["merged"]), str(tmp_path / "images"), "--out", str(tmp_path / "out")]
        assert [predict(files), predict(files)] == [0, 0]

    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_predictions_are_replaced_by_whole_files(self, fitted, tmp_path, kind):
        """A file that is written in place is half a picture when the command is killed."""
        write_image(tmp_path / "images" / "a.png", noise())
        files = [str(fitted[kind][1]["merged"]), str(tmp_path / "images"), "--out", str(tmp_path / "out")]
        assert predict(files) == 0
        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        linked = {path: tmp_path / f"{number}.linked" for number, path in enumerate(written)}
        for path, link in linked.items():
            os.link(path, link)
        assert predict(files) == 0
        assert not [path for path, link in linked.items() if path.samefile(link)]

    @pytest.mark.parametrize("through_it", [False, True], ids=["from_the_folder", "through_the_link"])
    @pytest.mark.parametrize("link", ["self", "deeper/up"])
    def test_a_link_that_leads_back_is_not_followed(self, fitted, tmp_path, link, through_it):
        """A pattern would find each image forty times."""
        for name in ("images/a", "images/deeper/b", "elsewhere/c"):
            write_image(tmp_path / f"{name}.png", noise())
        (tmp_path / "images" / link).symlink_to(tmp_path / "images")
        (tmp_path / "images" / "other").symlink_to(tmp_path / "elsewhere")
        start = tmp_path / "images" / (link if through_it else "")
        images, masks = str(start / "**" / "*.png"), tmp_path / "out" / "masks"
        assert predict([str(fitted["masks"][1]["merged"]), images, "--out", str(tmp_path / "out")]) == 0
        written = {file.relative_to(masks).as_posix() for file in masks.rglob("*.png")}
        assert written == {"a.png", "deeper/b.png", "other/c.png"}

    def test_what_a_killed_command_left_of_masks_is_removed(self, fitted, tmp_path):
        for name in ("a", "deeper/b"):
            write_image(tmp_path / "images" / f"{name}.png", noise())
        name = f".c.png.{'0' * 8}-1-0123abcd"
        left = [tmp_path / "out" / kind / "deeper" / name for kind in ("masks", "overlays")]
        for path in left:
            path.parent.mkdir(parents=True)
            path.touch()
            os.utime(path, (0, 0))
        images = str(tmp_path / "images" / "**" / "*.png")
        assert predict([str(fitted["masks"][1]["merged"]), images, "--out", str(tmp_path / "out")]) == 0
        assert not [path for path in left if path.exists()]

    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_a_model_that_answers_with_nan(self, fitted, tmp_path, capsys, kind):
        """The largest of NaN is the first class."""
        write_image(tmp_path / "images" / "a.png", noise())
        file, out = tmp_path / "diverged.safetensors", tmp_path / "out"
        with safe_open(fitted[kind][1]["merged"], "pt") as merged:
            said = merged.metadata()
        tensors = load_file(fitted[kind][1]["merged"])
        save_file({name: t * float("nan") if t.is_floating_point() else t for name, t in tensors.items()}, file, said)
        assert predict([str(file), str(tmp_path / "images"), "--out", str(out)]) == 1
        assert "The model answers with NaN" in capsys.readouterr().err
        assert not [path for path in out.rglob("*") if path.is_file()]

    @pytest.mark.parametrize("given", ["images", "images/*.png"])
    def test_a_name_that_is_no_text(self, fitted, tmp_path, capsys, given):
        write_image(tmp_path / "images" / os.fsdecode(b"caf\xe9.png"), noise())
        files = [str(fitted["labels"][1]["merged"]), str(tmp_path / given), "--out", str(tmp_path / "out")]
        assert predict(files) == 1
        assert r"UTF-8. Rename (1):" in (said := capsys.readouterr().err)
        assert r"caf\udce9.png" in said

    def test_an_empty_text_is_not_the_current_folder(self, fitted, tmp_path, monkeypatch, capsys):
        write_image(tmp_path / "a.png", noise())
        monkeypatch.chdir(tmp_path)
        assert predict([str(fitted["labels"][1]["merged"]), "", "--out", "out"]) == 1
        assert "A name of images is empty" in capsys.readouterr().err

    def test_out_lies_below_the_own_home(self, fitted, tmp_path, monkeypatch):
        """A shell does not expand `--out=~/found`."""
        write_image(tmp_path / "a.png", noise())
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        assert predict([str(fitted["labels"][1]["merged"]), "a.png", "--out=~/found"]) == 0
        assert (tmp_path / "home" / "found" / "labels.csv").exists()
        assert not (tmp_path / "~").exists()

    def test_out_is_not_empty(self, fitted, tmp_path, monkeypatch, capsys):
        write_image(tmp_path / "a.png", noise())
        monkeypatch.chdir(tmp_path)
        assert predict([str(fitted["labels"][1]["merged"]), "a.png", "--out", ""]) == 1
        assert "argument --out: it is empty" in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"a.png"}

    def test_an_error_is_one_line(self, tmp_path, capsys):
        assert predict([str(tmp_path / "nothing"), str(tmp_path), "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("error: There is no")


class TestWhatIsPredicted:
    def test_a_folder_with_brackets_in_its_name(self, fitted, tmp_path, capsys):
        folder = tmp_path / "photos [2020]"
        write_image(folder / "more" / "a.png", noise())
        files = [str(fitted["labels"][1]["merged"]), str(folder), "--out", str(tmp_path / "out")]
        assert predict(files) == 1
        pattern = re.search(r"In the folders below there is 1: '(.*)'", capsys.readouterr().err)[1]
        assert predict([*files[:1], pattern, *files[2:]]) == 0
        write_image(folder / "a.png", noise())
        assert predict(files) == 0

    def test_each_image_has_a_mask_of_its_own(self, fitted, tmp_path):
        for name in ("a.jpg", "a.png", "a.jpg.png", "b.png"):
            write_image(tmp_path / "images" / name, noise())
        files = [str(fitted["masks"][1]["merged"]), str(tmp_path / "images"), "--out", str(tmp_path / "out")]
        assert predict(files) == 0
        found = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
        assert found == {"a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png"}

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (["images/a.png"], ["a.png"]),
            (["images"], ["a.png", "b.jpg"]),
            (["images/**/*.jpg"], ["b.jpg", "further/b.jpg"]),
            (["images/b.jpg", "images/further", "images/b.jpg"], ["b.jpg", "further/b.jpg"]),
        ],
        ids=["an image", "a folder", "a pattern", "several"],
    )
    def test_is_an_image_a_folder_or_a_pattern(self, fitted, tmp_path, capsys, given, expected):
        for name in ("a.png", "b.jpg", "further/b.jpg"):
            write_image(tmp_path / "images" / name, noise())
        (tmp_path / "images" / "notes.txt").write_text("no image")
        paths = [str(tmp_path / each) for each in given]
        assert predict([str(fitted["labels"][1]["merged"]), *paths, "--out", str(tmp_path / "out")]) == 0
        rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").read_text().splitlines()))
        assert [row["image"] for row in rows] == expected
        plural = "s" if len(expected) > 1 else ""
        assert f"Labels of {len(expected)} image{plural} with probabilities: {tmp_path}" in capsys.readouterr().out

    def test_masks_lie_as_the_images_do(self, fitted, tmp_path, capsys):
        for name in ("x/a.png", "y/a.png", "y/a.jpg"):
            write_image(tmp_path / "images" / name, noise())
        out = tmp_path / "masks"
        assert predict([str(fitted["masks"][1]["merged"]), str(tmp_path / "images/*/*"), "--out", str(out)]) == 0
        written = {file.relative_to(out).as_posix() for file in out.rglob("*.png")}
        names = ("x/a.png", "y/a.png.png", "y/a.jpg.png")
        assert written == {f"{folder}/{name}" for folder in ("masks", "overlays") for name in names}
        told = f"Masks of 3 images: {out / 'masks'}, and over the images: {out / 'overlays'}"
        assert told in capsys.readouterr().out

    @pytest.mark.parametrize("there", ["new/../old/b.png", "new/link/../old/b.png"], ids=["folder", "link"])
    def test_a_path_through_the_folder_above(self, fitted, tmp_path, monkeypatch, there):
        for name in ("new/a.png", "old/b.png"):
            write_image(tmp_path / name, noise())
        (tmp_path / "new" / "link").symlink_to(tmp_path / "old")
        monkeypatch.chdir(tmp_path)
        before = Path("old/b.png").read_bytes()
        assert predict([str(fitted["masks"][1]["merged"]), "new/a.png", there, "--out", "."]) == 0
        written = {file.as_posix() for kind in ("masks", "overlays") for file in Path(kind).rglob("*.png")}
        assert written == {f"{kind}/{name}" for kind in ("masks", "overlays") for name in ("new/a.png", "old/b.png")}
        assert Path("old/b.png").read_bytes() == before

    def test_what_of_a_folder_is_not_read_is_said(self, fitted, tmp_path, capsys):
        write_image(tmp_path / "images" / "x.png", noise())
        for name in ("b.heic", "c.gif", "more/d.png"):
            write_image((tmp_path / "images" / name).with_suffix(".png"), noise())
            (tmp_path / "images" / name).with_suffix(".png").rename(tmp_path / "images" / name)
        (tmp_path / "images" / ".DS_Store").write_bytes(b"")
        given = str(fitted["labels"][1]["merged"]), str(tmp_path / "images")
        assert predict([*given, "--out", str(tmp_path / "out")]) == 0
        left = f"Left out: 3, such as {tmp_path / 'images' / 'b.heic'}, which is no image file here"
        assert capsys.readouterr().out.splitlines()[-1] == left

    def test_a_folder_of_folders(self, fitted, tmp_path, capsys):
        write_image(tmp_path / "images" / "x" / "a.png", noise())
        assert predict([str(fitted["labels"][1]["merged"]), str(tmp_path / "images")]) == 1
        said = capsys.readouterr().err
        assert "holds no image (.bmp, .jpeg, " in said
        assert f"). In the folders below there is 1: '{tmp_path}/images/**/*'." in said

    def test_a_pattern_that_matches_nothing(self, fitted, tmp_path, capsys):
        assert predict([str(fitted["labels"][1]["merged"]), str(tmp_path / "*.png")]) == 1
        assert "*.png matches no image" in capsys.readouterr().err

    def test_the_folder_of_a_run_names_its_adapter(self, fitted, tmp_path, capsys):
        run = fitted["labels"][1]["adapter"].parent
        assert predict([str(run), str(tmp_path)]) == 1
        assert f"is no adapter folder, but holds one: {run / 'adapter'}" in capsys.readouterr().err
