"""A change of `LightningCLI._parse_ckpt_path` of Lightning 2.6.6: how hyperparameters of a checkpoint become arguments.

Without it, `--ckpt_path` fails for a module that saves hyperparameters by itself, without naming its class with them,
and a truncated file ends in an error of torch.
"""

from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI

from lora_plugins.integrations.lightning.checkpoint import allowed, reading_errors


class CheckpointArguments(LightningCLI):
    """Takes the hyperparameters of a checkpoint as arguments of the model only where they name the model's class.

    Where they do not, the configuration names class and arguments.
    """

    def _parse_ckpt_path(self) -> None:
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if self.subclass_mode_model and path and Path(path).is_file():
            with allowed(), reading_errors(path):
                checkpoint = torch.load(path, weights_only=True, map_location="cpu")
            if "_class_path" not in checkpoint.get("hyper_parameters", {}):
                return
        super()._parse_ckpt_path()
