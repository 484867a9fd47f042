"""LoRA in PyTorch Lightning: a callback for any LightningModule, small checkpoints, and a command line.

    Trainer(callbacks=[LoraCallback(LoraConfig(r=8, target_modules=["attn.qkv"]))]).fit(module)

Names are imported when they are first used, so that the program can say what to install where Lightning is missing.
The rooms: `callback` ties `module`, `checkpoint`, `strategies`, `shims`, `training` and `console` together, with files
beside it such as `run` and `results`; `cli` is on top of it.
"""

from typing import TYPE_CHECKING

from lora_plugins.lazy import lazily

if TYPE_CHECKING:
    from lora_plugins.integrations.lightning.adapter_files import AdapterFile
    from lora_plugins.integrations.lightning.aliases import alias_pytorch_lightning
    from lora_plugins.integrations.lightning.callback import LoraCallback
    from lora_plugins.integrations.lightning.checkpoint import LoraCheckpointMixin, load_from_checkpoint
    from lora_plugins.integrations.lightning.cli import LoraCLI
    from lora_plugins.integrations.lightning.training import parameter_groups

__all__ = [
    "AdapterFile",
    "LoraCLI",
    "LoraCallback",
    "LoraCheckpointMixin",
    "alias_pytorch_lightning",
    "load_from_checkpoint",
    "parameter_groups",
]

_MODULES = {
    "AdapterFile": "adapter_files",
    "LoraCLI": "cli",
    "LoraCallback": "callback",
    "LoraCheckpointMixin": "checkpoint",
    "alias_pytorch_lightning": "aliases",
    "load_from_checkpoint": "checkpoint",
    "parameter_groups": "training",
}

__getattr__, __dir__ = lazily(__name__, _MODULES, extra="lightning")
