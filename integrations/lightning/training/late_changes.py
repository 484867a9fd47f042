"""Tells what is changed after the results of a run were made, as by `on_fit_end` of its module."""

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.module import checksums, trained_parameters
from lora_plugins.integrations.lightning.training.frozen_base import changed


class LateChanges:
    """What a run has trained, as it is saved and merged.

    Args:
        module: The module, with its adapters.
    """

    def __init__(self, module: LightningModule) -> None:
        self._trained = trained_parameters(module)
        self._sums = checksums(self._trained)

    def tell(self) -> None:
        """Names what has changed since."""
        if late := changed(self._sums, self._trained):
            rank_zero_warn(
                f"{len(late)} of {len(self._sums)} trained tensors were changed after the adapter was saved and "
                f"merged, which has their values of before: {listing(late)}. on_fit_end of the module, or of a "
                "callback behind the LoraCallback, does that, as to take the averages of a schedule-free optimizer. "
                "Do it in on_train_end, which comes before."
            )
