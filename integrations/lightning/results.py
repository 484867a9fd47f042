"""The results of a run when `fit` ends: files of the adapter, the merged model, and which checkpoint is the best."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import ConfigError, LoraModel
from lora_plugins.adapter import moved_base, present_state
from lora_plugins.errors import MergeError, listing
from lora_plugins.files import PackedAdapter, write
from lora_plugins.inplace import full_name, submodule
from lora_plugins.integrations.lightning.adapter_files import AdapterFile, titles
from lora_plugins.integrations.lightning.module import (
    adapted_layers_moved,
    file_entries,
    known_bases,
    moved_by_hand,
    plain_state_dict,
    put_back_known_bases,
    temporarily_merged,
    write_safetensors,
)
from lora_plugins.integrations.lightning.shims import is_fast_dev_run
from lora_plugins.integrations.lightning.strategies import CheckpointShims, gather_adapter, is_sharded
from lora_plugins.utils import plain_name


@contextmanager
def explaining_merges(files: Sequence[AdapterFile]) -> Iterator[None]:
    """Adds to an error of a merge that ends a fit which options avoid it, and what is saved already."""
    try:
        yield
    except MergeError as error:
        saved = f" The adapter is saved: {listing(file.path for file in files)}." if files else ""
        raise MergeError(
            f"{error} In a fit, max_error is an argument of the LoraCallback; merge_on_fit_end=False and "
            f"export_to=None leave the adapter beside the base.{saved}"
        ) from error


@dataclass(frozen=True)
class Results:
    """What is written of one adapter.

    Args:
        adapter_name: Its name.
        target: The name of the module that it is on; empty for the whole.
        files: The files of the adapter.
        export_to: The file of the merged model; None for none.
        max_error: Share of an update that the merge may lose to rounding.
        dequantize: Whether stored weights become dense in the merged model.
    """

    adapter_name: str
    target: str
    files: Sequence[AdapterFile]
    export_to: str | None
    max_error: float
    dequantize: bool

    def write(self, trainer: Trainer, module: nn.Module, written: Set[str]) -> dict[str, Path]:
        """Writes the files, by the first process alone, and returns their paths by what they are.

        `written` names what the module has written into its base before the training, or moves by hand in it.
        """
        target = submodule(module, self.target)
        paths: dict[str, Path] = {}
        self._warn_of_moved(module, target, written)
        entries = file_entries(module, self.target)
        for title, file in zip(titles(self.files), self.files, strict=True):
            packed = self._packed(trainer, target, entries) if file.is_ours else None  # gathered by all processes
            if trainer.is_global_zero:
                path = file.write(target, self.adapter_name) if packed is None else write(Path(file.path), packed)
                paths[title.capitalize()] = path
        if self.export_to is not None and trainer.is_global_zero:
            with temporarily_merged(target, self.max_error, dequantize=self.dequantize):
                tensors = plain_state_dict(target)
            try:
                paths["Merged model"] = write_safetensors(Path(self.export_to), tensors, entries)
            except OSError as error:
                if self.files:
                    error.add_note(f"The adapter is saved: {listing(file.path for file in self.files)}.")
                raise
        return paths

    def _warn_of_moved(self, module: nn.Module, target: nn.Module, written: Set[str]) -> None:
        moved = adapted_layers_moved(module)
        if self.files and moved:
            rank_zero_warn(
                f"The module has moved the frozen weights of {listing(moved, 3)} by hand, as those of a teacher, and "
                "the files of the adapter do not have them: put on other models, it is exact for all other layers. "
                "Checkpoints and export_to have them."
            )
        changed = {full_name(self.target, n) for n in moved_base(target, present_state(target), self.adapter_name)}
        told = sorted(changed - (moved_by_hand(module) - written).union(moved))
        if told and any(file.is_ours for file in self.files):  # of the other formats, save_adapter warns by itself
            rank_zero_warn(
                f"{listing(told, 3)} have changed since the adapter was added, as codebooks and queues do, or weights "
                "that a hook of the module writes, and the files of the adapter do not have them: on the base as it "
                "was, it computes something else. Name their modules in modules_to_save, or write such weights in "
                "setup(). Checkpoints and export_to have them."
            )

    def _packed(self, trainer: Trainer, target: nn.Module, entries: Mapping[str, Any]) -> PackedAdapter:
        """Returns the whole adapter, with what the module declares for its files."""
        packed = LoraModel(target).pack(self.adapter_name)
        if is_sharded(trainer):
            packed = gather_adapter(trainer, packed, plain_name(self.target))
        return PackedAdapter({**packed.manifest, **entries}, packed.tensors)


def best_checkpoint(trainer: Trainer) -> str:
    """Returns the path of the best checkpoint, empty if none was written; before training, it only checks the trainer.

    Raises:
        ConfigError: If no ModelCheckpoint says what is best.
    """
    monitors = [c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
    if not monitors:
        raise ConfigError(
            "merge_source='best' needs a ModelCheckpoint with a `monitor` among the trainer's callbacks, which "
            "says what is best."
        )
    return str(getattr(monitors[0], "best_model_path", ""))


def load_best(trainer: Trainer, module: LightningModule) -> None:
    """Loads the best checkpoint into the module; without one, the last weights stay."""
    path = trainer.strategy.broadcast(best_checkpoint(trainer))  # a monitored metric may differ between processes
    if path:
        known = known_bases(module)
        checkpoint = CheckpointShims.load_own(trainer, path)
        module.on_load_checkpoint(checkpoint)  # as Lightning does: what the module's own hook leaves out is its matter
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        put_back_known_bases(module, known)
    elif not is_fast_dev_run(trainer):  # which saves none
        rank_zero_warn(
            "merge_source='best', and no checkpoint was written: nothing was trained, or the monitor of the "
            "ModelCheckpoint was never logged, as without validation. The last weights are taken."
        )
