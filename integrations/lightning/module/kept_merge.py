"""The merge at the end of `fit`, kept as long as it may be undone: by a later fit, or to load an adapter."""

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lora_plugins import MergeError
from lora_plugins.adapter import model_state
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.module.reversible_merge import ReversibleMerge, merge_reversibly


class KeptMerge:
    """The last merge of an adapter, and whether it was `undone` in the present run."""

    def __init__(self, adapter_name: str) -> None:
        self.undone = False
        self._adapter_name = adapter_name
        self._merge: ReversibleMerge | None = None

    @property
    def is_kept(self) -> bool:
        """Whether there is one."""
        return self._merge is not None

    def keep(self, merge: ReversibleMerge) -> None:
        """Records a merge."""
        self._merge = merge

    def undo(self, target: nn.Module, module_name: str) -> bool:
        """Undoes the merge if the target still has the merged values, and returns whether it does.

        If the target has other values by now, these stay, and a line says so if it is the target that was merged.
        """
        merge = self._merge
        if merge is None or model_state(target) is not None:
            return False
        if merge.is_of(target):
            merge.undo(target)
            self._merge, self.undone = None, True
            return True
        if merge.target() is target:
            rank_zero_info(
                f"The weights of {module_name} are no more those that the adapter {self._adapter_name!r} was merged "
                f"into: {listing(merge.replaced(target), 3)} have other values. The merge is not taken back: the "
                "weights that are there are the base now."
            )
            self._merge = None
        return False

    def make_again(self, target: nn.Module, max_error: float, *, dequantize: bool) -> None:
        """Repeats a merge that was undone, so that weights that are loaded next find a plain module."""
        if model_state(target) is None:
            return
        try:
            self._merge = merge_reversibly(target, max_error, dequantize=dequantize)
        except MergeError as error:  # what was tested is right nevertheless
            rank_zero_warn(f"The adapter stays on the module: {error}")
