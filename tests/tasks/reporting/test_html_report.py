"""The report of a fit."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import (
    DigitScenesDataModule,
    DigitsDataModule,
    HtmlReport,
    ImageClassificationTask,
    SemanticSegmentationTask,
)

from ..conftest import tiny_segformer, tiny_vit


def scenes():
    return DigitScenesDataModule([1, 2, 3], train_scenes=4, val_scenes=3, batch_size=2)


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
