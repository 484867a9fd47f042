"""What a run shows on a terminal, in a file, and after Ctrl-C."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_plugins import LoraModel
from lora_plugins.cli import INTERRUPTED, TERMINATED
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning.console import FitConsole
from tests.integrations.lightning.console.talkative import SAID
from tests.integrations.lightning.toys import Classifier, loader, trainer

pytest.importorskip("pyte")

from tests.integrations.lightning.console.terminal import run

HERE = "tests.integrations.lightning.console.talkative"
FIT = [sys.executable, "-m", "lora_plugins", "fit", "--config"]


@pytest.fixture
def config(tmp_path):
    """Writes a configuration whose steps take some seconds each, and gives its path."""

    def write(seconds=0.0, epochs=3, **trainer):
        content = {
            "seed_everything": 1,
            "model": {"class_path": f"{HERE}.Talkative", "init_args": {"width": 8, "seconds": seconds}},
            "data": {"class_path": "tests.integrations.lightning.toys.Data"},
            "lora": {"r": 2, "target_modules": ["net.0", "net.3"]},
            "lora_callback": {
                "save_adapter_to": str(tmp_path / "adapter"),
                "export_to": str(tmp_path / "m.safetensors"),
            },
            "trainer": {
                "max_epochs": epochs,
                "accelerator": "cpu",
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(tmp_path)},
                },
                "callbacks": [{"class_path": f"{HERE}.Last"}],
                **trainer,
            },
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "run.yaml")

    return write


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_a_terminal_loses_no_line_and_keeps_one_of_the_bar(config, columns, tmp_path):
    seen = run([*FIT, config()], columns)
    assert seen.code == 0, seen.lines
    assert seen.cursor
    text = " ".join(" ".join(seen.lines).split())
    assert [each for each in SAID if text.count(f"said: {each}") != 1] == []
    last = [line for line in seen.lines if "100%" in line]
    assert len(last) == 1
    assert re.fullmatch(r"Epoch 3/3 ━+ 100% +val/loss \d\.\d{3}", last[0])
    assert len(last[0]) == columns
    assert re.search(r"2 layers adapted, \d+ of \d+ parameters trainable", text)
    whole = "".join(line.ljust(columns) for line in seen.lines)  # paths are not wrapped: the terminal breaks them
    for what, path in {"Adapter": "adapter", "Merged model": "m.safetensors", "Configuration": "run.yaml"}.items():
        assert f"{what}: {tmp_path / path}" in whole
    for what in ("Checkpoint: ", "Log: ", "Next:", "lora-plugins validate --config", "lora-plugins inspect"):
        assert what in whole
    for noise in ("GPU available", "Seed set", "Tip:", "LeafSpec", "many workers", "FLOPs", "max_epochs="):
        assert noise not in whole


@pytest.mark.filterwarnings("ignore:said")
def test_what_was_not_validated_is_not_to_be(config, capsys):
    assert main(["fit", "--config", config(limit_val_batches=0)]) == 0
    out = capsys.readouterr().out
    assert "lora-plugins inspect" in out
    assert "lora-plugins validate" not in out


@pytest.mark.filterwarnings("ignore:said")
@pytest.mark.parametrize("flags", [[], ["--lora.r", "3"]], ids=["alone", "with_a_flag"])
def test_the_configuration_is_the_whole_one(config, capsys, flags):
    path = config()
    assert main(["fit", "--config", path, *flags]) == 0
    (said,) = re.findall(r"Configuration: (\S+)", capsys.readouterr().out)
    assert (said == path) == (not flags)
    assert not flags or yaml.safe_load(Path(said).read_text())["lora"]["r"] == 3


def test_a_file_has_plain_lines(config):
    """Also where colors are asked for in pipes: lines are drawn over nowhere but on a terminal."""
    done = subprocess.run([*FIT, config()], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode()
    assert [
        line for line in out.splitlines() if re.match(r"epoch \d/3  val/loss \d\.\d+  train/loss \d\.\d+", line)
    ] == [line for line in out.splitlines() if line.startswith("epoch ")]
    assert out.count("\nepoch ") == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    assert done.stderr.decode().splitlines()[-1].strip() in {f"said: {each}" for each in SAID}


class LogsSteps(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("step/loss", loss)
        return loss


def test_a_file_waits_for_values_at_the_end_of_an_epoch_only(tmp_path, monkeypatch):
    """To read a value is to wait for the device."""
    read, own = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda value: read.append(value) or own(value))
    trainer(tmp_path, [FitConsole()], max_epochs=2).fit(LogsSteps(), loader())
    assert len(read) == 2 * len(["step/loss", "train/loss"])


def test_a_resumed_run_of_limited_steps_says_what_time_is_left(tmp_path, capsys):
    """Of four batches each, such steps are fewer than batches."""
    options = {"accumulate_grad_batches": 4, "max_steps": 20}
    trainer(tmp_path, [ModelCheckpoint(tmp_path, save_last=True)], max_epochs=2, **options).fit(Classifier(), loader())
    resumed = trainer(tmp_path, [FitConsole()], max_epochs=4, **options)
    resumed.fit(Classifier(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines
    assert all(re.search(r"\d:\d\d:\d\d left$", line) for line in lines)


def test_ctrl_c_saves_what_there_is_and_says_where(config, tmp_path):
    seen = run([*FIT, config(seconds=0.05, epochs=500)], 100, press_after="Epoch 2/")
    assert seen.code == INTERRUPTED == 130, seen.lines
    text = "\n".join(seen.lines)
    assert seen.cursor
    assert "Stopping, to save what there is" in text
    assert "Stopped by Ctrl-C. Saved:" in text
    assert "said: at the end of fit" in text
    assert "Traceback" not in text
    assert LoraModel.load_adapter(Classifier(width=8), tmp_path / "adapter").active_adapters == ("default",)
    assert (tmp_path / "m.safetensors").is_file()
    assert list(tmp_path.rglob("*.ckpt"))


def test_sigterm_is_no_success(config):
    """Lightning by itself ends with 0, and what comes after `&&` runs without the files of the fit."""
    command = [*FIT, config(seconds=0.05, epochs=500)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("epoch 2/"))
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert process.returncode == TERMINATED == 143, said
    assert re.search(r"Ended by SIGTERM, without results\. Left is .*\.ckpt; --ckpt_path goes on from it", said)
    assert "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_ends_a_fit_that_must_train_longer(config, tmp_path):
    seen = run([*FIT, config(seconds=0.05, epochs=500, min_epochs=400)], 100, press_after="Epoch 2/")
    assert seen.code == INTERRUPTED, seen.lines
    assert (tmp_path / "adapter" / "adapter.json").is_file()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(config, tmp_path):
    step = 60.0
    seen = run([*FIT, config(seconds=step)], 100, press_after="Epoch 1/", times=2)
    assert seen.code == INTERRUPTED, seen.lines
    assert seen.waited < step
    assert seen.cursor
    assert "Ended at once." in "\n".join(seen.lines)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_ctrl_c_before_training_leaves_nothing(config, tmp_path):
    seen = run([sys.executable, "-X", "importtime", *FIT[1:], config()], 100, press_after="jsonargparse")
    assert seen.code == INTERRUPTED, seen.lines[-20:]
    assert "Interrupted." in "\n".join(seen.lines)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore:said")
def test_a_user_who_wants_no_bar_or_another_gets_that(config, capsys):
    assert main(["fit", "--config", config(enable_progress_bar=False)]) == 0
    out = capsys.readouterr().out
    assert "epoch 1/3" not in out
    assert "Adapter: " in out
    bar = [{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}]
    assert main(["fit", "--config", config(callbacks=bar)]) == 0
    captured = capsys.readouterr()
    assert "epoch 1/3" not in captured.out
    assert "Epoch 2" in captured.out + captured.err
