"""Shims of the two methods by which a strategy saves and loads checkpoints.

Checked against Lightning 2.6.6:

- `strategy.save_checkpoint`: callbacks are not asked when only weights are saved, and WeightAveraging puts a full model
  into the file after everyone else was asked. Every save of every kind passes here.
- `strategy.load_checkpoint`: callbacks see a checkpoint only after its weights were loaded. An error that is raised
  here leaves the Trainer without a checkpoint; after one that is raised later, the next run loads the file again.

The shims are removed at the end of a run if the module carries no adapter by then, as after a merge; the next run's
`setup`, which comes before any loading, installs them again. While the module carries an adapter, they stay with their
Trainer: `trainer.save_checkpoint` after `fit` has to write the small file too, and Lightning calls no hook before it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.integrations.lightning.checkpoint import (
    KEY,
    allowed,
    before_hook,
    check_whole,
    missing_layers,
    original,
    reading_errors,
    restore,
    shrink,
    without_base,
)
from lora_plugins.integrations.lightning.module import adapted_targets
from lora_plugins.integrations.lightning.shims import MethodShims, callbacks_of
from lora_plugins.integrations.lightning.strategies.file_checkpoint import save_file
from lora_plugins.integrations.lightning.strategies.sharded_checkpoint import load_sharded, save_sharded
from lora_plugins.integrations.lightning.strategies.sharding import is_sharded

_METHODS = ("save_checkpoint", "load_checkpoint")

_OF_TUNERS = (".lr_find_", ".scale_batch_size_")
"""How the names of files begin that tuners read back after trials in which no hook tells what the module moves."""


_OF_A_STOPPED_RUN = (
    " OnExceptionCheckpoint gives this file to every fit as long as it is there: remove it before. It has no adapter "
    "where a run was stopped before its module was adapted, or after the merge."
)

_OF_A_MERGED_RUN = (
    " A LoraCallback was in the run that saved it, and the adapter merged by then: go on from a file saved before fit "
    "ends, such as one of ModelCheckpoint, or fit with merge_on_fit_end=False."
)


class Owner(Protocol):
    """What the checkpoint shims need of a LoraCallback."""

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint."""

    def undo_merge(self, module: nn.Module) -> bool:
        """Undoes a merge, since an adapter is about to be loaded, and returns whether there was one."""

    def awaited(self, module: LightningModule) -> dict[tuple[str, str], LoraConfig]:
        """Returns the adapter that waits for a checkpoint, by target and name; empty if there is none."""

    def before_save(self, trainer: Trainer) -> None:
        """Learns that a checkpoint is about to be written."""

    def restored(self, trainer: Trainer, changed: bool, whole: bool) -> None:
        """Learns that the module has the adapters of a checkpoint.

        `changed` says whether it had others or none before, or in another order; `whole`, whether the base is about to
        be loaded as well.
        """


class CheckpointShims:
    """Small files on every path on which a strategy saves, complete ones on every path on which it loads."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._owners: list[Owner] = []
        self._written: set[str] = set()
        self._keeps_moved = False
        self._hook_shims: MethodShims | None = None
        strategy = trainer.strategy
        self._before = {name: vars(strategy).get(name) for name in _METHODS}
        self._save, self._load = strategy.save_checkpoint, strategy.load_checkpoint
        strategy.save_checkpoint = self._shim(self.save)  # type: ignore[method-assign]
        strategy.load_checkpoint = self._shim(self.load)  # type: ignore[method-assign]

    @classmethod
    def install(cls, trainer: Trainer, owner: Owner) -> None:
        """Installs the shims of a trainer's strategy at the first call, and adds an owner."""
        shims = getattr(trainer.strategy.save_checkpoint, "lora_shims", None) or cls(trainer)
        if owner not in shims._owners:
            shims._owners.append(owner)

    @classmethod
    def remove(cls, trainer: Trainer, module: nn.Module) -> None:
        """Restores the strategy's own methods, unless the module carries adapters, or others have replaced ours."""
        present = vars(trainer.strategy)
        shims = getattr(present.get("save_checkpoint"), "lora_shims", None)
        ours = all(getattr(present.get(name), "lora_shims", None) is shims for name in _METHODS)
        if shims is None or not ours or adapted_targets(module):
            return
        for name, own in shims._before.items():
            del present[name]
            if own is not None:
                present[name] = own

    @staticmethod
    def load_own(trainer: Trainer, path: str) -> dict[str, Any]:
        """Reads a checkpoint of this run; if this process wrote it, with all objects among its hyperparameters.

        Training is over, so what the module has moved by hand since then is kept.
        """
        shims = getattr(trainer.strategy.save_checkpoint, "lora_shims", None)
        if shims is None:
            return trainer.strategy.load_checkpoint(path, weights_only=None)
        shims._keeps_moved = True
        try:
            return trainer.strategy.load_checkpoint(path, weights_only=False if path in shims._written else None)
        finally:
            shims._keeps_moved = False

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint without the frozen base, under a temporary name first."""
        for owner in self._owners:
            owner.before_save(self._trainer)
        shards, for_tuner = is_sharded(self._trainer), Path(filepath).name.startswith(_OF_TUNERS)
        small = shrink(checkpoint, self._module, whole=for_tuner and not shards)
        if shards:
            save_sharded(self._trainer, small, filepath, self._save)
        else:
            save_file(self._trainer, small, filepath, self._save, storage_options=storage_options)
        self._written.add(str(filepath))

    def load(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint and puts its adapters on the module.

        Raises:
            AdapterFileError: If the file is damaged, has no adapter though training is to go on with one, or belongs
                to another model.
        """
        if self._hook_shims is not None:  # of a checkpoint that was read and not loaded
            self._hook_shims.remove()
        if is_sharded(self._trainer):
            with allowed():
                return load_sharded(self._trainer, checkpoint_path, self._load, *args, **kwargs)
        with allowed(), reading_errors(checkpoint_path):
            checkpoint: dict[str, Any] = self._read(checkpoint_path, *args, **kwargs)
        check_whole(checkpoint_path, checkpoint)
        before = [name for name, _ in self._module.named_parameters()]
        complete = self._prepare(checkpoint_path, checkpoint)
        changed = before != [name for name, _ in self._module.named_parameters()]
        for owner in self._owners:
            owner.restored(self._trainer, changed, whole=bool(complete.get(KEY, {}).get("whole")))
        return complete

    def _read(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads it as the strategy does or, where that is not possible, onto the CPU by name.

        Lightning says so by a function, which torch does not take for tensors of other types, such as the optimizer
        states of torchao.
        """
        try:
            return self._load(checkpoint_path, *args, **kwargs)
        except RuntimeError as error:
            if "Callable map_location not supported" not in str(error):
                raise
        files, weights_only = self._trainer.strategy.checkpoint_io, kwargs.get("weights_only")
        return files.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def _prepare(self, checkpoint_path: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Restores the adapters of a checkpoint on the module, and returns the complete checkpoint."""
        if KEY not in checkpoint:
            self._prepare_for_plain(checkpoint_path, checkpoint)
            return checkpoint
        checkpoint = original(checkpoint)
        for owner in self._owners:
            owner.undo_merge(self._module)
        if not is_overridden("on_load_checkpoint", self._module):
            return self._restored(checkpoint)
        return self._load_around_hook(checkpoint)

    def _load_around_hook(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Restores adapters before the module's own hook, as far as there are layers, and again after it."""
        module = self._module
        restored = None if missing_layers(module, checkpoint) else self._restored(checkpoint)
        complete, after = before_hook(module, checkpoint, restored)
        shims = self._hook_shims = MethodShims(module)

        def after_hook(_: object) -> None:
            after()
            complete.update(self._restored(without_base(complete), again=restored is not None))

        shims.after("on_load_checkpoint", after_hook, before=shims.remove)  # ahead of it, as it may raise an error
        return complete

    def _restored(self, checkpoint: dict[str, Any], *, again: bool = False) -> dict[str, Any]:
        trains, module = self._trainer.state.fn == "fit", self._module
        owners = self._owners if trains else []
        awaited = {place: config for owner in owners for place, config in owner.awaited(module).items()}
        keep_moved = self._keeps_moved or not trains
        complete = restore(module, checkpoint, keep_moved=keep_moved, again=again, awaited=awaited)
        if not trains and "current_model_state" in complete:
            # After a fit of the same Trainer, WeightAveraging would put the weights before averaging into a module
            # that is to be tested. The metric in the file's name is that of the averaged ones.
            complete["current_model_state"] = complete["state_dict"]
        return complete

    def _prepare_for_plain(self, path: Any, checkpoint: Mapping[str, Any]) -> None:
        """Removes the adapters of the module, since a checkpoint without adapters is about to be loaded."""
        if self._trainer.state.fn == "fit":
            callbacks = callbacks_of(self._trainer)
            given_again = any(isinstance(c, OnExceptionCheckpoint) and c.ckpt_path == str(path) for c in callbacks)
            known = checkpoint.get("callbacks", {})
            was_merged = checkpoint.get("global_step", 0) > 0 and any(
                owner.state_key in known for owner in self._owners
            )
            raise AdapterFileError(
                f"{path} holds no adapter of lora_plugins, so training with one cannot go on from it. To start from "
                f"its weights: {type(self._module).__name__}.load_from_checkpoint(path), then fit without ckpt_path."
                f"{_OF_A_STOPPED_RUN if given_again else _OF_A_MERGED_RUN if was_merged else ''}"
            )
        for target in adapted_targets(self._module).values():
            LoraModel(target).unload()

    @property
    def _module(self) -> LightningModule:
        return self._trainer.lightning_module

    def _shim(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what stands in for a method of the strategy; a pickle or a copy of that has shims of its own."""
        shim = partial(method)
        shim.lora_shims = self  # type: ignore[attr-defined]
        return shim
