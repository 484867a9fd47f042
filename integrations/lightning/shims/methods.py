"""The places where Lightning has no hook: functions put on one instance, and taken off again.

No class is patched and no attribute of the Trainer is set. All of it was checked against Lightning 2.6.6:

- `module.setup`, `module.configure_model`: layers may be built there, after `Callback.setup`, and optimizers are made
  before the next callback hook. The adapters have to join in between.
- `module.configure_optimizers`: the one moment when an optimizer that was built too early can still be completed.
- `strategy.save_checkpoint`: callbacks are not asked when only weights are saved, and WeightAveraging puts a full model
  into the file after everyone else was asked. Every save of every kind passes here.
- `strategy.load_checkpoint`: callbacks see a checkpoint only after its weights were loaded. An error that is raised
  here leaves the Trainer without a checkpoint; after one that is raised later, the next run loads the file again.

Those of the module are removed when the run ends, and those of the strategy with them once the module carries no
adapter, as after a merge; the next run's `setup`, which comes before any loading, puts them back. While the module does
carry one, they stay with their Trainer: `trainer.save_checkpoint` after `fit` has to write the small file too, and no
hook of Lightning's is called before it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import nn

from lora_plugins import AdapterFileError, LoraModel
from lora_plugins.integrations.lightning.checkpoint.content import KEY, adapted_targets, reading, restore, shrink
from lora_plugins.integrations.lightning.strategies import sharded
from lora_plugins.integrations.lightning.strategies.sharded import is_sharded

_STRATEGY_METHODS = ("save_checkpoint", "load_checkpoint")


class Owner(Protocol):
    """What the checkpoint shims need of a LoraCallback."""

    def before_load(self, module: nn.Module) -> None:
        """Takes a merge back."""

    def forget(self) -> None:
        """Forgets a merge, since other weights are about to be loaded."""


class ModuleShims:
    """Functions that stand in for methods of one object, a module or a strategy, until they are removed.

    Several may stand in for one method, and be removed in any order.
    """

    def __init__(self, module: LightningModule | Strategy) -> None:
        self._module = module
        self._stand_ins: list[tuple[str, Any]] = []

    def after(self, name: str, then: Callable[[Any], None], before: Callable[[], None] | None = None) -> None:
        """Lets `then` see what the method returned, and `before` run ahead of it.

        The stand-in is a plain function: Lightning takes a method for not overridden where `functools.wraps` points
        to one that is not.
        """
        original = getattr(self._module, name)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if (name, stand_in) not in self._stand_ins:  # removed, while another one still calls it
                return original(*args, **kwargs)
            if before is not None:
                before()
            result = original(*args, **kwargs)
            then(result)
            return result

        stand_in.lora_below = self._module.__dict__.get(name)  # type: ignore[attr-defined]
        self._stand_ins.append((name, stand_in))
        self._module.__dict__[name] = stand_in

    def remove(self) -> None:
        """Gives the object its own methods again, once no other stand-in is above these."""
        removed, self._stand_ins = self._stand_ins, []
        for name, stand_in in reversed(removed):
            stand_in.lora_removed = True
            top: Any = self._module.__dict__.get(name)
            while getattr(top, "lora_removed", False):
                top = top.lora_below
            if top is None:
                self._module.__dict__.pop(name, None)
            else:
                self._module.__dict__[name] = top


class CheckpointShims:
    """Small files on every path on which a strategy saves, complete ones on every path on which it loads."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._owners: list[Owner] = []
        strategy = trainer.strategy
        self._before = {name: vars(strategy).get(name) for name in _STRATEGY_METHODS}
        self._save, self._load = strategy.save_checkpoint, strategy.load_checkpoint
        strategy.save_checkpoint = self._shim(self.save)  # type: ignore[method-assign]
        strategy.load_checkpoint = self._shim(self.load)  # type: ignore[method-assign]

    @classmethod
    def of(cls, trainer: Trainer, owner: Owner) -> "CheckpointShims":
        """Returns the shims of a trainer's strategy, installed at the first call, with one more owner."""
        present = getattr(trainer.strategy.save_checkpoint, "lora_shims", None)
        shims = cast(CheckpointShims, present) if present is not None else cls(trainer)
        if owner not in shims._owners:
            shims._owners.append(owner)
        return shims

    @classmethod
    def release(cls, trainer: Trainer, module: nn.Module) -> None:
        """Gives the strategy its own methods back, unless the module carries adapters, or others stand in for ours."""
        present = vars(trainer.strategy)
        shims = getattr(present.get("save_checkpoint"), "lora_shims", None)
        ours = all(getattr(present.get(name), "lora_shims", None) is shims for name in _STRATEGY_METHODS)
        if shims is None or not ours or adapted_targets(module):
            return
        for name, own in shims._before.items():
            del present[name]
            if own is not None:
                present[name] = own

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint without the frozen base, under a temporary name first."""
        small = shrink(checkpoint, self._module)
        if is_sharded(self._trainer):
            sharded.save(self._trainer, small, filepath, self._save)
            return
        if not _is_plain_file(self._trainer.strategy, filepath):
            self._save(small, filepath, storage_options=storage_options)
            return
        path = Path(filepath)
        partial = path.with_name(f".{path.name}.partial")
        self._save(small, partial, storage_options=storage_options)
        if self._trainer.is_global_zero:
            _flush(partial)
            os.replace(partial, path)

    def load(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint and puts its adapters onto the module.

        Raises:
            AdapterFileError: If the file is damaged, has no adapter though training is to go on with one, or belongs
                to another model.
        """
        if is_sharded(self._trainer):
            return sharded.load(self._trainer, checkpoint_path, self._load, *args, **kwargs)
        with reading(checkpoint_path):
            checkpoint: dict[str, Any] = self._load(checkpoint_path, *args, **kwargs)
        if KEY not in checkpoint:
            self._load_plain(checkpoint_path)
            return checkpoint
        for owner in self._owners:
            owner.before_load(self._module)
        complete = restore(self._module, checkpoint)
        if self._trainer.state.fn != "fit" and "current_model_state" in complete:
            # After a fit of the same Trainer, WeightAveraging would put the weights before averaging into a module
            # that is to be tested. The metric in the file's name is that of the averaged ones.
            complete["current_model_state"] = complete["state_dict"]
        return complete

    def _load_plain(self, path: Any) -> None:
        """Makes room for a checkpoint without adapters."""
        if self._trainer.state.fn == "fit":
            raise AdapterFileError(
                f"{path} holds no adapter of lora_plugins, so training with one cannot go on from it. To start from "
                f"its weights: {type(self._module).__name__}.load_from_checkpoint(path), then fit without ckpt_path."
            )
        for owner in self._owners:
            owner.forget()
        for target in adapted_targets(self._module).values():
            LoraModel(target).unload()

    @property
    def _module(self) -> LightningModule:
        return self._trainer.lightning_module

    def _shim(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        stand_in.lora_shims = self  # type: ignore[attr-defined]
        return stand_in


def _is_plain_file(strategy: Strategy, path: Any) -> bool:
    """Whether the strategy writes one local file by the time that its save_checkpoint returns."""
    return type(strategy.checkpoint_io) is TorchCheckpointIO and "://" not in str(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
