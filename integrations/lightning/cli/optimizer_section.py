"""A change of `LightningCLI._add_configure_optimizers_method_to_model` of Lightning 2.6.6: no needless warning.

Without it, every run of one of our tasks with a section `optimizer:` warns that the section replaces the task's own.
"""

from lightning.pytorch.cli import LightningCLI

from lora_plugins.integrations.lightning.shims import expecting_override


class OptimizerSection(LightningCLI):
    """Lets the section `optimizer:` replace the `configure_optimizers` of our tasks without a warning."""

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        with expecting_override(self.model):
            super()._add_configure_optimizers_method_to_model(subcommand)
