"""`LoraCLI`: LightningCLI with a `lora:` section."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from torch.optim import Optimizer

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.integrations.lightning.callback import LoraCallback
from lora_plugins.integrations.lightning.checkpoint.content import reading
from lora_plugins.integrations.lightning.console import print_plan
from lora_plugins.integrations.lightning.shims.expected_warnings import expecting_override


class LoraCLI(LightningCLI):
    """Runs a Trainer from a YAML file that may have two sections more than Lightning's own.

    `lora:` holds the fields of a `LoraConfig`, inline or as the path of a YAML file with them; with it, a
    `LoraCallback` joins the trainer's callbacks, ahead of them. `lora_callback:` holds the callback's other
    arguments. Without `lora:`, this is LightningCLI. Model and data are named by `class_path`. The optimizer of the
    section `optimizer:` trains what requires a gradient, adapters included.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("subclass_mode_model", True)
        kwargs.setdefault("subclass_mode_data", True)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})  # without a logger, runs share one folder
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the two sections."""
        parser.add_argument(
            "--lora",
            type=LoraConfig | None,
            default=None,
            sub_configs=True,
            help="How LoRA is applied; null for none. Fields, or the path of a YAML file with them.",
        )
        parser.add_class_arguments(LoraCallback, "lora_callback", skip={"config"}, instantiate=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer, with the callback if there is a `lora:` section."""
        config = self._get(self.config_init, "lora")
        if config is not None:
            options = self._get(self.config_init, "lora_callback")
            callback = LoraCallback(config, **(options.as_dict() if isinstance(options, Namespace) else options))
            section = self._get(self.config_init, "trainer")
            others = section.get("callbacks") or []
            section["callbacks"] = [callback, *(others if isinstance(others, list) else [others])]
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6.6 takes a checkpoint's hyperparameters for the arguments of the model. A module that saves them
        # itself does not say its class with them, and then they are none: the configuration names class and arguments.
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if self.subclass_mode_model and path and Path(path).is_file():
            with reading(path):
                checkpoint = torch.load(path, weights_only=True, map_location="cpu")
            if "_class_path" not in checkpoint.get("hyper_parameters", {}):
                return
        super()._parse_ckpt_path()

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        with expecting_override(self.model):
            super()._add_configure_optimizers_method_to_model(subcommand)

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Gives the optimizer what requires a gradient now: it was built before the module was adapted.

        Its parameter group is changed in place, so that the scheduler goes on driving it.
        """
        trained = [parameter for parameter in lightning_module.parameters() if parameter.requires_grad]
        optimizer.param_groups[0]["params"][:] = trained
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)


class PlanCLI(LoraCLI):
    """Prints what `fit` would adapt, of the same arguments, and trains nothing."""

    def fit(self, model: LightningModule, **_: Any) -> None:
        """Takes the place of `Trainer.fit`.

        Raises:
            TargetError: If the configuration does not fit the model.
            ConfigError: If nothing is to be adapted.
        """
        callbacks = [c for c in self.trainer.callbacks if isinstance(c, LoraCallback)]  # type: ignore[attr-defined]
        if not callbacks:
            raise ConfigError("There is nothing to plan: no `lora:` section and no LoraCallback among the callbacks.")
        model.configure_model()
        for callback in callbacks:
            print_plan(callback.plan(model), f"LoRA adapter {callback.adapter_name!r}, not trained yet")
