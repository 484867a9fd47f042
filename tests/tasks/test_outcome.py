"""What a fit leaves is read again: checkpoints, adapters, merged files; predictions, exports, pictures, a report."""

import csv
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from safetensors.torch import save_file

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import (
    DigitScenesDataModule,
    DigitsDataModule,
    HtmlReport,
    ImageClassificationTask,
    SemanticSegmentationTask,
    TensorBoardImages,
    WeightsError,
    export_task,
    load_task,
    merged_task,
)
from lora_plugins.tasks.inference import export_main as export
from lora_plugins.tasks.inference import mask_probabilities
from lora_plugins.tasks.inference import predict_main as predict
from lora_plugins.tasks.models import CLASSIFIERS, SEGMENTERS, build_network
from lora_plugins.tasks.segmentation import class_colors

from .conftest import noise, tiny_segformer, tiny_vit, write_image

KINDS = ["checkpoint", "adapter", "merged"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The three files of a fit, and the fitted task, by kind of task."""
    from lightning.pytorch import Trainer

    found = {}
    for kind, make, sources, tiny, data in (
        ("labels", ImageClassificationTask, CLASSIFIERS, tiny_vit, DigitsDataModule([0, 1, 2])),
        ("masks", SemanticSegmentationTask, SEGMENTERS, tiny_segformer, scenes()),
    ):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        save_file(build_network(tiny(), sources).module.state_dict(), folder / "base.safetensors")
        # Balanced, so that not all of a mask is the ground.
        task = make(tiny(weights=str(folder / "base.safetensors")), lr=1e-2, class_weights="balanced")
        lora = LoraCallback(
            LoraConfig(r=2, modules_to_save=["head" if kind == "labels" else "decode_head.classifier"]),
            target="network",
            save_adapter_to=str(folder / "adapter"),
            export_to=str(folder / "merged.safetensors"),
            print_plan=False,
        )
        Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[lora, ModelCheckpoint(folder / "run", filename="it")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(task, datamodule=data)
        files = {"checkpoint": "run/it.ckpt", "adapter": "adapter", "merged": "merged.safetensors"}
        found[kind] = (task.eval(), {name: folder / file for name, file in files.items()})
    return found


def scenes():
    return DigitScenesDataModule([1, 2, 3], train_scenes=4, val_scenes=3, batch_size=2)


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_the_task_comes_back_with_its_classes(fitted, kind, file):
    task, files = fitted[kind]
    again = load_task(files[file])
    assert type(again) is type(task)
    assert again.class_names == task.class_names
    images = torch.rand(2, 3, 16, 16) if kind == "labels" else torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(again(images), task(images), atol=1e-5, rtol=1e-4)


def test_load_from_checkpoint_takes_an_adapter_alone(fitted):
    task, files = fitted["labels"]
    stored = torch.load(files["checkpoint"], weights_only=True)
    assert not any(key.endswith("qkv.weight") for key in stored["state_dict"])
    again = ImageClassificationTask.load_from_checkpoint(files["checkpoint"], weights_only=True).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), task(images), atol=1e-5, rtol=1e-4)


def test_a_file_that_does_not_say_what_it_is_of(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="does not say which task"):
        load_task(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="There is no"):
        load_task(tmp_path / "nothing.ckpt")


class TestPrediction:
    @pytest.mark.parametrize("file", KINDS)
    def test_labels(self, fitted, tmp_path, file, capsys):
        task, files = fitted["labels"]
        for i, size in enumerate(((20, 24), (90, 33))):
            write_image(tmp_path / "images" / f"{i}.png", noise(*size, seed=i))
        task.image_size = (16, 16)
        assert predict([str(files[file]), str(tmp_path / "images"), str(tmp_path / "out"), "--flips"]) == 0
        rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").read_text().splitlines()))
        assert [row["image"] for row in rows] == ["0.png", "1.png"]
        for row in rows:
            shares = [float(row[name]) for name in task.class_names]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert task.class_names[int(np.argmax(shares))] == row["label"]

    @pytest.mark.parametrize("file", KINDS)
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
        assert predict([str(files[file]), str(tmp_path / "images"), str(tmp_path / "out"), *options]) == 0
        task.image_size = (64, 64)
        for name, (height, width) in sizes.items():
            image = torch.from_numpy(noise(height, width)).permute(2, 0, 1).float() / 255
            expected = mask_probabilities(task, image, **meant).argmax(0).numpy()
            with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as mask:
                assert (mask.mode, mask.size) == ("P", (width, height))
                assert len(np.unique(expected)) > 1
                assert (np.asarray(mask) == expected).mean() > 0.999  # but for ties that a merge decides otherwise
                assert mask.getpalette()[: 3 * len(task.class_names)] == class_colors(4).ravel().tolist()
            with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as picture:
                assert (picture.mode, picture.size) == ("RGB", (width, height))

    def test_one_window_over_all_is_the_network_itself(self, fitted):
        task, _ = fitted["masks"]
        image = torch.rand(3, 64, 64)
        found = mask_probabilities(task, image, window=(64, 64))
        torch.testing.assert_close(found, task(image[None]).softmax(1)[0].detach())

    def test_flips_make_the_answer_a_mirror_of_that_of_the_mirror_image(self, fitted):
        task, _ = fitted["masks"]
        image = torch.rand(3, 64, 96)
        one, two = (mask_probabilities(task, i, window=(64, 64), flips=True) for i in (image, image.flip(-1)))
        torch.testing.assert_close(one, two.flip(-1), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("labels", ["--window", "8", "8"], "A window is for masks"),
            ("masks", ["--window", "0", "8"], "window is 0x8"),
            ("masks", ["--overlap", "1"], "share of the window"),
        ],
        ids=["window of labels", "window of nothing", "overlap"],
    )
    def test_options_that_cannot_be(self, fitted, tmp_path, capsys, kind, options, message):
        write_image(tmp_path / "images" / "a.png", noise())
        files = [str(fitted[kind][1]["merged"]), str(tmp_path / "images"), str(tmp_path / "out")]
        assert predict([*files, *options]) == 1
        assert message in capsys.readouterr().err

    def test_images_that_cannot_be_read(self, fitted, tmp_path, capsys):
        write_image(tmp_path / "images" / "b.png", noise())
        for name in ("a", "c"):
            (tmp_path / "images" / f"{name}.png").write_bytes(b"no picture")
        files = [str(fitted["labels"][1]["merged"]), str(tmp_path / "images"), str(tmp_path / "out")]
        assert predict(files) == 1
        said = capsys.readouterr().err
        assert "2 of 3 images cannot be read" in said
        assert "a.png" in said
        assert "c.png" in said
        assert not (tmp_path / "out").exists()
        with pytest.warns(UserWarning, match="2 of 3 images"):
            assert predict([*files, "--skip"]) == 0
        assert (tmp_path / "out" / "labels.csv").read_text().count("\n") == 2

    def test_an_error_is_one_line(self, tmp_path, capsys):
        assert predict([str(tmp_path / "nothing"), str(tmp_path), str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("error: There is no")


class TestExport:
    @pytest.mark.parametrize(("kind", "size"), [("labels", (16, 16)), ("masks", (64, 64))])
    def test_torch_export(self, fitted, tmp_path, kind, size):
        """At the size of the data, embedded or not, which the files know."""
        task = merged_task(fitted[kind][1]["adapter"])
        assert export_task(task, tmp_path / "m.pt2") < 1e-5
        images = torch.rand(3, 3, *size)
        found = torch.export.load(tmp_path / "m.pt2").module()(images)
        torch.testing.assert_close(found, task(images), atol=1e-5, rtol=1e-4)

    def test_another_size(self, fitted, tmp_path, capsys):
        files = [str(fitted["masks"][1]["merged"]), str(tmp_path / "m.pt2")]
        assert export([*files, "--size", "32", "96"]) == 0
        assert "logits as the task's, within" in capsys.readouterr().out
        found = torch.export.load(files[1]).module()(torch.rand(1, 3, 32, 96))
        assert found.shape == (1, 4, 32, 96)

    def test_a_size_is_needed(self, fitted, tmp_path):
        task = load_task(fitted["masks"][1]["merged"])
        task.image_size = None
        with pytest.raises(ConfigError, match="--size HEIGHT WIDTH"):
            export_task(task, tmp_path / "m.pt2")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnxscript
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_onnx(self, fitted, tmp_path, kind):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        assert export_task(merged_task(fitted[kind][1]["adapter"]), tmp_path / "m.onnx") < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_has_curves_and_pictures(trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(logger=logger, callbacks=[TensorBoardImages(samples=2)], max_epochs=2, log_every_n_steps=1)
    run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert {"val/mean_iou", "val/iou/ground", "train/loss"} <= set(events.Tags()["scalars"])
    for name in ("val/examples", "val/confusion"):
        assert len(events.Images(name)) == 2


def test_pictures_are_not_lost_in_another_logger(trainer, tmp_path):
    run = trainer(logger=CSVLogger(tmp_path), callbacks=[TensorBoardImages()])
    with pytest.raises(ConfigError, match="needs a TensorBoardLogger"):
        run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())


@pytest.fixture
def report(trainer, tmp_path):
    """The report of a fit of masks, with LoRA."""
    lora = LoraCallback(LoraConfig(r=2), target="network", save_adapter_to=str(tmp_path / "a"), print_plan=False)
    path = tmp_path / "report.html"
    run = trainer(callbacks=[lora, HtmlReport(str(path), samples=2)], num_sanity_val_steps=-1, max_epochs=2)
    run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())
    return path


class TestReport:
    def test_it_holds_all_and_needs_nothing_beside_it(self, report):
        text = report.read_text()
        wanted = ("mean_iou", "before (frozen base, new head)", "parameters trained", "size of the adapter", "q_proj")
        for part in (*wanted, "Curve of loss", "Confusion matrix", "Best examples", "Worst examples", "peak memory"):
            assert part in text
        assert "http" not in text.replace("http-equiv", "")
        assert text.count("data:image/png;base64,") == 5

    @pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
    def test_a_browser_shows_it(self, report, tmp_path):
        picture = tmp_path / "seen.png"
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        shown = subprocess.run(
            [*browser, "--window-size=1000,2000", f"--screenshot={picture}", report.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert picture.is_file(), shown.stderr
        pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 200  # text, curves and pictures, not a blank page


def test_curves_have_a_point_an_epoch(trainer, tmp_path):
    """A task logs its metrics of the train split after the callbacks' turn."""
    report = HtmlReport(str(tmp_path / "r.html"))
    trainer(callbacks=[report], max_epochs=3).fit(
        ImageClassificationTask(tiny_vit()), datamodule=DigitsDataModule([0, 1, 2])
    )
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert [epoch for epoch, _ in report._history[name]] == [0, 1, 2]


def test_a_report_of_labels(trainer, tmp_path):
    path = Path(tmp_path / "r.html")
    trainer(callbacks=[HtmlReport(str(path))]).fit(
        ImageClassificationTask(tiny_vit()), datamodule=DigitsDataModule([0, 1, 2])
    )
    assert "Worst examples" in path.read_text()
