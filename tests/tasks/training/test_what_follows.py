"""The commands that a run ends with."""

import sys

import pytest
from lightning.pytorch import Trainer

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import ModelConfig
from lora_plugins.tasks.training.what_follows import next_commands


@pytest.mark.parametrize("lacking", [None, "onnxruntime", "onnxscript"])
def test_the_export_that_is_offered_can_be_done(lacking, monkeypatch):
    if lacking is not None:
        monkeypatch.setitem(sys.modules, lacking, None)
    callback = LoraCallback(LoraConfig(), export_to="m.safetensors")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    commands = next_commands(trainer, ModelConfig("timm", "test_vit", 2, "none"))
    kind = "onnx" if lacking is None else "pt2"
    assert commands["Write it for other runtimes"] == f"lora-plugins export m.safetensors model.{kind}"
