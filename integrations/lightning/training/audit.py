"""Checks during a run that every trainable tensor gets a gradient and changes, and that nothing else does."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lora_plugins.inplace import named_tensors
from lora_plugins.integrations.lightning.module import (
    NetworkCopy,
    Start,
    adapted_weights,
    checksums,
    frozen_by_author,
    frozen_tensors,
    is_adapted_alike,
    mark_moved,
    moved_by_hand,
    trained_parameters,
)
from lora_plugins.integrations.lightning.strategies import reshard
from lora_plugins.integrations.lightning.training.averages import renews_statistics
from lora_plugins.integrations.lightning.training.changes_within_run import ChangesWithinRun
from lora_plugins.integrations.lightning.training.first_steps import FirstSteps
from lora_plugins.integrations.lightning.training.frozen_base import changed, check_unchanged
from lora_plugins.integrations.lightning.training.lost_eps import warn_of_lost_eps
from lora_plugins.integrations.lightning.training.lost_writes import LostWrites
from lora_plugins.integrations.lightning.training.moved_by_hand import MovedByHand
from lora_plugins.integrations.lightning.training.optimizer_groups import parameters_of
from lora_plugins.utils import within


class Audit:
    """Watches a run from the start of its training: its first steps, and its frozen base throughout.

    Args:
        trainer: The trainer.
        module: Its module, adapted.
        copies: The copies of adapted networks in the module, once there are optimizers.
        start: What the module was when it was adapted: what it has written since, before training, is in no other
            module of its class, and checkpoints hold it.
        lost_writes: What watches the module since then.
        teachers: The names of the tensors of adapters that were frozen when the module was adapted.

    Attributes:
        written: The names of what it has written so, or moves by hand in training, except for teachers and averages.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        copies: Sequence[NetworkCopy],
        start: Start,
        lost_writes: LostWrites,
        teachers: Set[str],
    ) -> None:
        self._trainer, self._module = trainer, module
        reshard(module)  # of which the sanity check may have left a part whole
        start.mark_written(module)
        self._followers = [name for copy in copies for name in copy.followers]
        self.written: set[str] = set()
        self._note_written(moved_by_hand(module) - frozen_by_author(module))
        self._fingerprints = start.fingerprints
        trained, held = trained_parameters(module), parameters_of(trainer.optimizers)
        self._alike_copies = [copy for copy in copies if is_adapted_alike(module, copy)]
        self._by_hand = MovedByHand(module, copies)
        self._first: FirstSteps | None = FirstSteps(trained, held, copies, self._alike_copies)
        self._lost_writes = lost_writes
        lost_writes.start(module)  # with layers that a hook has adapted since
        self._changes = ChangesWithinRun(trainer, module, self._alike_copies, teachers)
        self._objects = self._still()  # no weak references, with which `nn.Module.to` cannot swap a tensor
        self._frozen = checksums(self._objects)
        self._stepped = self._lost_eps = False
        self._rates: list[float] = []
        self._scale = 1.0

    def before_batch(self, *, first_of_epoch: bool) -> None:
        """Names layers that were built since, and notes the rates of the first batches.

        Raises:
            StateError: If such layers have to be adapted, or adapters are merged.
        """
        if self._first is not None:
            self._lost_writes.check()
            # Before a scheduler changes them at the batch's end.
            self._rates = [_rate(group) for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
            self._scale = loss_scale(self._trainer)
        if first_of_epoch:
            self._changes.check_layers()
            self.note_moved()
            self._by_hand.forget()  # callbacks may have exchanged the whole module
            self._changes.before_epoch()
        self._changes.before_batch()
        self._changes.check_trainable()
        self._by_hand.before_batch()

    def freeze_base(self) -> None:
        """Freezes what was made trainable of the base.

        Raises:
            StateError: If an optimizer trains it.
        """
        self._changes.freeze_base()

    def before_step(self, optimizer: Optimizer) -> None:
        """Notes in the first steps what has a gradient, and which optimizer makes the step.

        Raises:
            StateError: If the module has written into the weight of an adapted layer.
        """
        if self._first is not None:
            self._lost_writes.check()
            self._changes.before_step()
            self._stepped = True
            every = [*self._trainer.optimizers, optimizer]  # last, whose rates count where others have its tensors too
            groups = [group for each in every for group in each.param_groups]
            waiting = parameters_of(self._trainer.optimizers) - parameters_of([optimizer])
            self._first.before_step({id(p): _rate(group) for group in groups for p in group["params"]}, waiting)

    def after_batch(self, outputs: Any) -> None:
        """Checks in the first steps that everything trainable gets a gradient and changes, and nothing else does.

        Raises:
            StateError: If nothing trainable does, or something frozen.
        """
        self._by_hand.check()
        if self._first is None:
            return
        self._lost_writes.check()
        self._changes.check_layers()
        stepped, self._stepped = self._stepped, False  # not `global_step`, which counts what a module left out as well
        without_loss = self._module.automatic_optimization and not outputs  # `training_step` returned None
        overflow = loss_scale(self._trainer) < self._scale  # in float16
        skipped = not stepped or without_loss or overflow or renews_statistics(self._trainer)
        self._name_lost_eps()
        if not skipped and not self._first.after_step(self._rates):
            self._first = None
            self._lost_writes.stop()
            self._check_unchanged()

    def _name_lost_eps(self) -> None:
        if not self._lost_eps:
            self._lost_eps = warn_of_lost_eps(self._trainer.optimizers, trained_parameters(self._module))

    def before_validation(self) -> None:
        """Checks copies before validation, in which callbacks exchange the whole module."""
        self._by_hand.check()
        self._by_hand.forget()

    def note_moved(self) -> None:
        """Records what the module has changed by hand, for the checkpoint that is about to be written."""
        reshard(self._module)
        self._by_hand.settle()
        moved = changed(self._frozen, self._may_be_moved(self._still()))
        mark_moved(self._module, moved, self._fingerprints)
        self._note_written(moved)

    def _still(self) -> dict[str, Tensor]:
        """Returns the frozen base, and what its author froze and has moved before, as in the run that is resumed."""
        own = moved_by_hand(self._module) & frozen_by_author(self._module)
        moved = {n: t for n, t in named_tensors(self._module).items() if n in own and not within(n, self._followers)}
        return frozen_tensors(self._module) | moved

    def _note_written(self, names: Iterable[str]) -> None:
        self.written.update(name for name in names if not within(name, self._followers))

    def _may_be_moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of a teacher, of a copy, or new ones: what the author may change without the optimizer."""
        own, new = frozen_by_author(self._module), self._put_in_place(tensors)
        copies = [name for copy in self._alike_copies for name in copy.followers]
        return {n: t for n, t in tensors.items() if n in own or n in new or within(n, copies)}

    def _put_in_place(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Returns the names of tensors by which the module has replaced others, and that nobody trains.

        So are results that a module keeps as parameters, such as quantiles in an `nn.ParameterDict`.
        """
        held, adapted = parameters_of(self._trainer.optimizers), set(adapted_weights(self._module))
        return {
            name
            for name, tensor in tensors.items()
            if name in self._objects and self._objects[name] is not tensor
            if id(tensor) not in held and name not in adapted
        }

    def explain(self, error: BaseException) -> None:
        """Adds to an error what may have caused it."""
        self._lost_writes.stop()
        self._by_hand.explain(error)

    def _check_unchanged(self) -> None:
        tensors = self._still()
        moved = changed(self._frozen, tensors)
        by_hand = self._may_be_moved({name: tensors[name] for name in moved})
        mark_moved(self._module, by_hand, self._fingerprints)
        self._note_written(by_hand)
        check_unchanged([name for name in moved if name not in by_hand])

    def finish(self) -> dict[str, int]:
        """Checks that the frozen base has not changed.

        Returns:
            The checksums of the base, by name.

        Raises:
            StateError: If it has.
        """
        reshard(self._module)
        self._changes.name_adapters()
        self._name_lost_eps()
        if self._first is not None:
            self._lost_writes.check()
            self._lost_writes.stop()
            self._first.finish()
        self._by_hand.finish()
        self._check_unchanged()
        return {name: self._frozen[name] for name in frozen_tensors(self._module) if name in self._frozen}


def _rate(group: Mapping[str, Any]) -> float:
    """Returns the learning rate of a parameter group; an optimizer that finds its own (A2Grad, AliG) has none there."""
    return float(group.get("lr", math.inf))


def loss_scale(trainer: Trainer) -> float:
    """Returns the factor of the loss in `16-mixed`, which falls when a step is skipped; 1 elsewhere."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if isinstance(scaler, torch.amp.GradScaler) else 1.0
