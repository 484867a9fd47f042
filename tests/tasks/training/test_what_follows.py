"""The commands that a run ends with."""

import sys

import pytest
from lightning.pytorch import Trainer

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import ModelConfig
from lora_plugins.tasks.training.what_follows import next_commands, note_on_the_base


@pytest.mark.parametrize("lacking", [None, "onnxruntime", "onnxscript"])
def test_the_export_that_is_offered_can_be_done(lacking, monkeypatch):
    if lacking is not None:
        monkeypatch.setitem(sys.modules, lacking, None)
    callback = LoraCallback(LoraConfig(), export_to="m.safetensors")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    commands = next_commands(trainer, ModelConfig("timm", "test_vit", 2, "none"))
    kind = "onnx" if lacking is None else "pt2"
    assert commands["Write it for other runtimes"] == f"lora-plugins export m.safetensors model.{kind}"


def note(weights, **options):
    callbacks = [LoraCallback(LoraConfig(), **options)] if options else []
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
    return note_on_the_base(trainer, ModelConfig("timm", "test_vit", 2, weights))


def test_an_adapter_of_random_weights_is_told_to_be_of_no_use_alone():
    assert "adapter fits no other" in note("none", save_adapter_to="a")


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("none", {}),
        ("none", {"export_to": "m.safetensors"}),
        ("none", {"save_adapter_to": "a", "export_to": "m.safetensors"}),
        ("package:digits_classifier", {"save_adapter_to": "a"}),
    ],
    ids=["no adapter", "merged", "both", "weights of a file"],
)
def test_others_are_told_nothing(weights, options):
    assert note(weights, **options) is None
