"""The comparison trains what it says."""

import pytest

from lora_plugins.tasks.examples import METHODS, run_comparison

# The comparison gives its arguments to LightningCLI, which sees that pytest has arguments too.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("configuration", ["cls", pytest.param("seg", marks=pytest.mark.slow)])
def test_the_comparison_trains_what_it_says(configuration):
    outcomes = {name: run_comparison(configuration, method, *SHORT) for name, method in METHODS.items()}
    frozen, lora, full = (outcomes[name] for name in ("frozen backbone", "LoRA", "full fine-tuning"))
    assert frozen.trained < lora.trained < full.trained == full.total
    assert frozen.total == lora.total == full.total


@pytest.mark.slow
# On the splits of the digits by name, LoRA has an accuracy of 0.907, and the frozen backbone one of 0.623.
@pytest.mark.parametrize(("configuration", "gain", "within"), [("cls", 0.25, 0.05), ("seg", 0.3, 0.05)])
def test_lora_is_far_above_a_frozen_backbone_and_near_full_fine_tuning(configuration, gain, within):
    outcomes = {name: run_comparison(configuration, method).value for name, method in METHODS.items()}
    assert outcomes["LoRA"] > outcomes["frozen backbone"] + gain
    assert outcomes["LoRA"] > outcomes["full fine-tuning"] - within
