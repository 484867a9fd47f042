"""What is pushed is the adapter with its card: the real client, against a small server on the loopback."""

import os
import subprocess
import sys

import pytest

from tests.core.hub.server import running_hub

SCRIPT = """
import sys
import torch
from lora_plugins import LoraModel
from tests.integrations.transformers.toys import logits, trainer, vit

fields = {"hub_always_push": True}  # by default a push is left out while another one goes on
run = trainer("out", push_to_hub=True, hub_model_id="owner/flowers", hub_strategy=sys.argv[1],
    eval_strategy="epoch", **fields)
run.train()
if sys.argv[1] == "end":
    run.push_to_hub(license="mit", finetuned_from="owner/base")
again = vit()
LoraModel.load_adapter(again, "hf://owner/flowers")
assert torch.equal(logits(again), logits(run.model))
"""


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.mark.parametrize("strategy", ["end", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_the_adapter_is_pushed_and_loaded(hub, tmp_path, strategy):
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_of_the_test",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, strategy], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pushed = hub.repositories["owner/flowers"]["main"]
    top = {path for path in pushed if "/" not in path}
    assert not any(path.startswith(("model", "pytorch_model")) for path in top)
    assert {"adapter.json", "training_args.bin"} <= top
    if strategy == "end":
        card = pushed["README.md"].decode()
        assert "license: mit" in card
        assert "base_model: owner/base" in card
        assert 'LoraModel.load_adapter(model, "hf://owner/flowers")' in card
        assert "| loss |" in card
    if strategy == "checkpoint":
        assert "last-checkpoint/adapter.json" in pushed
