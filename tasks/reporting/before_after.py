"""The metrics of the val split before and after a fit, as a table."""

import math

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from lora_plugins import ConfigError
from lora_plugins.integrations.lightning.console import plain_console
from lora_plugins.integrations.lightning.shims import is_fast_dev_run

PREFIX = "val/"


class BeforeAfter(Callback):
    """Prints the metrics of the val split before training and after its last validation.

    "Before" is Lightning's sanity check, which has to cover the whole split: `num_sanity_val_steps: -1` of the trainer.
    With `fast_dev_run` there is no such check, and the column stays empty.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks before training that there will be something to compare with.

        Raises:
            ConfigError: If the sanity check covers only a part of the split.
        """
        if stage != "fit":
            return
        self.before, self.after = {}, {}
        if trainer.num_sanity_val_steps != math.inf and not is_fast_dev_run(trainer):
            raise ConfigError(
                f"BeforeAfter compares the whole val split before and after training, but the trainer validates on "
                f"{trainer.num_sanity_val_steps} batches before training. Set num_sanity_val_steps to -1."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stores the metrics."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(PREFIX)}
        if trainer.sanity_checking:
            self.before = metrics
        elif trainer.state.fn == "fit":
            self.after = metrics

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table."""
        table = Table(title="Metrics on val")
        table.add_column("metric")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for name, value in self.after.items():
            table.add_row(name.removeprefix(PREFIX), _number(self.before.get(name)), _number(value))
        plain_console().print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
