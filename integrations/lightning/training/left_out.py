"""Warns before a fit of what it leaves out: new layers that nothing trains, and copies that no average reaches."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.module import kept_copies


def warn_of_left_out(module: LightningModule, forgotten: Sequence[str]) -> None:
    """Warns of layers that look newly initialized, and of copies of weights without A and B.

    Args:
        module: The module, whole.
        forgotten: The names of such layers.
    """
    if forgotten:
        rank_zero_warn(
            f"{listing(forgotten, 3)} of {type(module).__name__} look newly initialized, and nothing trains "
            "them. A new head belongs into modules_to_save, or into an attribute head_modules of the module; one "
            "that is to stay as it is can be left so."
        )
    kept = kept_copies(module)
    if kept:
        rank_zero_warn(
            f"{listing(kept, 3)} of {type(module).__name__} has copies of weights, made before there were "
            "adapters: what averages them, or measures the distance to them, does not see A and B, and pairs of "
            "parameters and copies may not belong together. After a merge they are still the pretrained weights: a "
            "module that puts them in place of its own, to validate say, is the pretrained one then. Make the copies "
            "in on_fit_start, or let EMAWeightAveraging average."
        )
