"""A run of the command on two processes: its numbers are those of all data, and it ends as any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_plugins.integrations.lightning import load_from_checkpoint
from lora_plugins.tasks import DigitsDataModule, ImageClassificationTask
from lora_plugins.tasks.data import Batch

# A port can be taken by another test that starts processes at the same time.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def fit(folder, *flags):
    trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    given = [part for name, value in trainer.items() for part in (f"--trainer.{name}", str(value))]
    command = [sys.executable, "-m", "lora_plugins", "fit", "--config", "recipe:cls", *given, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done, json.loads((folder / "runs/cls/report.json").read_text())


def test_losses_and_metrics_are_of_all_processes(tmp_path):
    done, report = fit(tmp_path, "--trainer.limit_train_batches", "3")
    assert "sync_dist" not in done.stderr
    assert "Saved:" in done.stdout
    (checkpoint,) = tmp_path.glob("runs/cls/logs/*/checkpoints/*.ckpt")
    task = load_from_checkpoint(ImageClassificationTask, checkpoint).eval()
    data = DigitsDataModule(digits=[4, 5, 6, 7, 8, 9], quarter_turns=1)
    data.prepare_data()
    data.setup("validate")
    batches = [Batch.read(batch) for batch in data.val_dataloader()]
    images, targets = torch.cat([each.images for each in batches]), torch.cat([each.targets for each in batches])
    if len(images) % 2:  # the sampler of two processes takes the first one again
        images, targets = torch.cat([images, images[:1]]), torch.cat([targets, targets[:1]])
    with torch.no_grad():
        logits = task(images)
    told = report["metrics"]
    assert told["loss"]["after"] == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-5)
    assert told["accuracy"]["after"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()), rel=1e-6)


def test_an_average_is_trained_by_a_scheduler_of_the_configuration(tmp_path):
    _, report = fit(tmp_path, "--trainer.limit_train_batches", "3", "--model.init_args.ema", "0.9")
    assert report["facts"]["Training"]["moving average"] == "0.9"
    assert report["facts"]["Training"]["schedule"] == "CosineAnnealingLR"


def test_report_counts_what_all_processes_train_on(tmp_path):
    _, report = fit(tmp_path)
    data = DigitsDataModule(digits=[4, 5, 6, 7, 8, 9], quarter_turns=1)
    data.prepare_data()
    data.setup("fit")
    assert [each["train"] for each in report["classes"]] == data.class_counts().tolist()
    assert report["facts"]["Training"]["batch size"] == "16 in each of 2 processes"


def test_processes_can_be_spawned(tmp_path):
    done, report = fit(tmp_path, "--trainer.strategy", "ddp_spawn", "--trainer.limit_train_batches", "3")
    assert report["facts"]["Environment"]["device"].startswith("2 x")
    assert "Saved:\n  Adapter: runs/cls/adapter\n  Merged model: runs/cls/merged.safetensors\n  Report: " in done.stdout
