"""A change of `LightningCLI._add_configure_optimizers_method_to_model` of Lightning 2.6.6: messages.

Without it, every run of one of our tasks with a section `optimizer:` warns that the section replaces the task's own,
and a value that torch refuses is a traceback.
"""

import warnings

from lightning.pytorch.cli import LightningCLI

from lora_plugins import ConfigError


class OptimizerSection(LightningCLI):
    """Lets the section `optimizer:` replace the `configure_optimizers` of our tasks without a warning.

    Raises:
        ConfigError: For values that the optimizer or the scheduler refuses.
    """

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        with warnings.catch_warnings():
            if type(self.model).configure_optimizers.__module__.startswith("lora_plugins."):
                warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden")
            try:
                super()._add_configure_optimizers_method_to_model(subcommand)
            except (TypeError, ValueError) as error:  # of the constructor
                raise ConfigError(f"`optimizer` or `lr_scheduler` cannot be built: {error}") from error
