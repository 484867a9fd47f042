"""LoraCallback in the YAML file of a LightningCLI that knows nothing of us."""

import pytest
from lightning.pytorch.cli import LightningCLI

from tests.integrations.lightning.toys import Classifier, Data

CONFIGS = {
    "class_path": "config: {class_path: lora_plugins.LoraConfig, init_args: {r: 3, target_modules: [net.0]}}",
    "fields": "config: {r: 3, target_modules: [net.0]}",
    "file": "config: lora.yaml",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_way_to_write_a_config(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    (tmp_path / "lora.yaml").write_text("r: 3\ntarget_modules: [net.0]\n")
    (tmp_path / "run.yaml").write_text(
        "trainer:\n"
        "  max_epochs: 1\n"
        "  accelerator: cpu\n"
        "  logger: false\n"
        "  enable_checkpointing: false\n"
        "  enable_progress_bar: false\n"
        "  callbacks:\n"
        "  - class_path: lora_plugins.integrations.lightning.LoraCallback\n"
        f"    init_args: {{{CONFIGS[kind]}}}\n"
    )
    LightningCLI(
        Classifier, Data, args=["fit", "--config", "run.yaml"], save_config_callback=None, seed_everything_default=1
    )
    assert "1 layer adapted" in capsys.readouterr().out
