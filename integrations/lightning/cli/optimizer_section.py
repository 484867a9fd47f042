"""A change of `LightningCLI._add_configure_optimizers_method_to_model` of Lightning 2.6.6: messages.

Without it, every run of one of our tasks with a section `optimizer:` warns that the section replaces the task's own, a
value that torch refuses is a traceback, and a section `lr_scheduler:` alone is passed over.
"""

import warnings
from typing import Any

from lightning.pytorch.cli import LightningCLI

from lora_plugins import ConfigError


class OptimizerSection(LightningCLI):
    """Lets the section `optimizer:` replace the `configure_optimizers` of our tasks without a warning.

    Raises:
        ConfigError: For values that the optimizer or the scheduler refuses, and for a scheduler without an optimizer.
    """

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        if subcommand in (None, "fit") and self.auto_configure_optimizers:
            _check_has_optimizer(self.config.get(str(subcommand), self.config))
        with warnings.catch_warnings():
            if type(self.model).configure_optimizers.__module__.startswith("lora_plugins."):
                warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden")
            try:
                super()._add_configure_optimizers_method_to_model(subcommand)
            except (TypeError, ValueError) as error:  # of the constructor
                raise ConfigError(f"`optimizer` or `lr_scheduler` cannot be built: {error}") from error


def _check_has_optimizer(config: Any) -> None:
    if config.get("lr_scheduler") and not config.get("optimizer"):
        raise ConfigError(
            "There is a section `lr_scheduler:` without `optimizer:`, and Lightning passes it over. Add the optimizer "
            "that it is for, such as {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}; or give the scheduler to "
            "the model, if that takes one: model.init_args.lr_scheduler."
        )
