"""What the tests of the commands share."""

import pytest
import yaml

from tests.integrations.lightning.cli.cli_cases import TOYS


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file with changes, and gives its path."""

    def write(**changes):
        content = {
            "seed_everything": 1,
            "model": {"class_path": f"{TOYS}.Classifier", "init_args": {"width": 8}},
            "data": {"class_path": f"{TOYS}.Data"},
            "lora": {"r": 2, "target_modules": ["net.0", "net.3"]},
            "lora_callback": {"save_adapter_to": str(tmp_path / "adapter")},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
            "trainer": {
                "max_epochs": 1,
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path),
            },
            **changes,
        }
        path = tmp_path / "config.in.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write
