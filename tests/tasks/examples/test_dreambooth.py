"""The embedded example of Dreambooth, from its YAML file: what it learns, what it keeps, and what it leaves."""

import json
import re
from importlib.resources import files
from operator import eq
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.cli.main import main
from lora_plugins.integrations.diffusers import Sampling, load_pipeline, sample
from lora_plugins.tasks import DigitPicturesDataModule
from lora_plugins.tasks.diffusion import pipeline_source
from lora_plugins.tasks.examples import DigitReader, load_digit_splits, run_dreambooth
from lora_plugins.tasks.examples.diffusion_pretraining import KNOWN_DIGITS, digit_prompt, pretrain_diffusion
from lora_plugins.tasks.examples.dreambooth_comparison import RUNS

pytest.importorskip("diffusers")
CONFIG = str(files("lora_plugins.tasks") / "dreambooth.yaml")
MOST_BYTES = 1_500_000


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def shares(printed):
    """By row of the printed table: the shares of the subject and of the other digits."""
    rows = re.findall(r"│ (before|after|reset) *│ *([\d.]+) │ *([\d.]+) │", printed)
    return {name: (float(subject), float(others)) for name, subject, others in rows}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_digit_is_learned_and_the_old_ones_are_kept(capsys):
    torch.set_num_threads(1)
    assert main(["fit", "--config", CONFIG, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]) == 0
    printed = capsys.readouterr().out
    found = shares(printed)
    assert found["before"][0] <= 0.1
    assert found["after"][0] >= 0.9
    assert found["after"][1] >= found["before"][1] - 0.02  # of 96 samples, one
    assert found["reset"] == found["before"]
    assert "the same as before, bit for bit" in printed
    folder = Path("runs/dreambooth")
    for name in ("before", "after", "digits-before", "digits-after", "digits-reset"):
        with Image.open(folder / f"{name}.png") as sheet:
            assert sheet.width > 100
    assert (folder / "digits-before.png").read_bytes() == (folder / "digits-reset.png").read_bytes()
    assert (folder / "adapter" / "adapter.json").is_file()
    assert len(list((folder / "pictures").glob("*.png"))) == 6
    assert "Epoch 10" in (folder / "report.html").read_text()
    check_files(folder)


def test_the_plan_shows_the_default_layers(capsys):
    assert main(["plan", "--config", CONFIG]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("unet.conv_in", "attn2.to_q", "text_encoder"))
    assert main(["plan", "--config", CONFIG, "--model.init_args.layers=[attention]"]) == 0
    assert "conv_in" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")  # pytest has arguments of its own
@pytest.mark.parametrize(("name", "trained"), [("LoRA", 103_248), ("full fine-tuning", 637_617)])
def test_a_row_of_the_comparison(name, trained):
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--data.init_args.class_pictures=null")
    outcome = run_dreambooth(0, "runs/here", *RUNS[name], *short)
    assert outcome.trained == trained
    assert outcome.before[1] == outcome.after[1] == 1
    assert Path("runs/here/digits-reset.png").is_file() == (name == "LoRA")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")  # pytest has arguments of its own
def test_a_reset_is_to_the_pipeline_of_the_task():
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--data.init_args.class_pictures=null")
    run_dreambooth(0, "runs/here", *short, "--model.init_args.prediction=v_prediction")
    before, reset = (Path(f"runs/here/digits-{name}.png").read_bytes() for name in ("before", "reset"))
    assert before == reset


def check_files(folder):
    """The merged pipeline and diffusers' own loader of its file draw the same pictures."""
    sampling = Sampling(steps=5, guidance=2.0)
    pipe = load_pipeline(pipeline_source("package:digits_diffusion"))
    pipe.load_lora_weights(str(folder / "pytorch_lora_weights.safetensors"))
    theirs = sample(pipe, ["a sks digit"] * 4, range(4), sampling)
    merged = sample(load_pipeline(folder / "merged"), ["a sks digit"] * 4, range(4), sampling)
    for first, second in zip(theirs, merged, strict=True):
        pairs = zip(first.tobytes(), second.tobytes(), strict=True)
        assert max(abs(one - other) for one, other in pairs) <= 1  # of 255


def test_the_shipped_model_draws_what_it_knows_and_is_small():
    folder = Path(pipeline_source("package:digits_diffusion"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST_BYTES
    digits = [digit for digit in KNOWN_DIGITS for _ in range(4)]
    prompts = [digit_prompt(digit) for digit in digits]
    drawn = sample(load_pipeline(folder), prompts, range(len(prompts)), Sampling(steps=10, guidance=2.0, batch_size=32))
    assert sum(map(eq, DigitReader().read(drawn), digits)) >= 0.9 * len(digits)


def test_the_reader_reads():
    test = load_digit_splits(range(10))["test"]
    pictures = [Image.fromarray((ink * 255).byte().numpy()) for ink in test.ink]
    assert sum(map(eq, DigitReader().read(pictures), test.labels.tolist())) > 0.98 * len(pictures)


def test_the_shipped_model_can_be_trained_again(tmp_path):
    pretrain_diffusion(tmp_path, steps=3)
    shipped = Path(pipeline_source("package:digits_diffusion"))
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (tmp_path, shipped)]
    assert names[0] == names[1]
    for part in ("unet", "text_encoder", "vae"):
        configs = [json.loads((folder / part / "config.json").read_text()) for folder in (tmp_path, shipped)]
        for config in configs:  # which release of the library has written it
            config.pop("transformers_version" if part == "text_encoder" else "_diffusers_version")
        assert configs[0] == configs[1]


def test_a_count_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="count is 1000; there are"):
        DigitPicturesDataModule(str(tmp_path), count=1000, prompt="a sks digit").prepare_data()


@pytest.mark.parametrize("other", [{"digit": 8}, {"seed": 1}, {"count": 5}])
def test_pictures_of_another_choice_are_not_learned_as_well(tmp_path, other):
    for _ in range(2):
        DigitPicturesDataModule(str(tmp_path), prompt="a sks digit").prepare_data()
    assert len(list(tmp_path.iterdir())) == 6
    with pytest.raises(ConfigError, match=r"pictures? of another digit, count or seed, such as digit-9-\d+\.png"):
        DigitPicturesDataModule(str(tmp_path), prompt="a sks digit", **other).prepare_data()
    assert len(list(tmp_path.iterdir())) == 6
