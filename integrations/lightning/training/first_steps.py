"""Checks in the first steps that every trainable tensor gets a gradient and changes."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.errors import counted, listing
from lora_plugins.integrations.lightning.module import NetworkCopy, local
from lora_plugins.utils import within

STEPS = 2
"""Batches with optimizer steps, at a learning rate above zero, after which nearly every trainable tensor has moved."""

PATIENCE = 10
"""Such batches after which one that has not moved is named: RAdam without its phase of SGD makes no step in five."""

_NO_GRADIENT = (
    "Likely causes: the layer is not on the way from the batch to the loss; or it is inside gradient checkpointing "
    "whose input needs no gradient (pass use_reentrant=False to torch.utils.checkpoint)."
)


@dataclass(eq=False)
class _Watched:
    """A trainable parameter, and what the steps so far have done to it.

    Args:
        parameter: The parameter.
        start: What it was, as far as it is on this process.
        steps: How many steps its optimizer has made.
        lacks_gradient: Whether it has had none. From the check on, only where it should have had one by then.
        lacks_rate: Whether the learning rate of its group was 0 in all steps.
        may_stay: Whether it is of a teacher or an average, which gets no gradient at all.
    """

    parameter: nn.Parameter
    start: Tensor
    steps: int = 0
    lacks_gradient: bool = True
    lacks_rate: bool = True
    may_stay: bool = False


class FirstSteps:
    """Watches parameters until each has had a gradient and has changed.

    Args:
        trained: The trainable parameters by name. Those that no optimizer has are watched where none has any.
        held: What optimizers have, by `id`.
        copies: The copies of adapted networks in the module.
        alike: Those that are adapted as their origins are: one that has no gradient at all is a teacher or an average.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        held: Collection[int],
        copies: Sequence[NetworkCopy],
        alike: Sequence[NetworkCopy],
    ) -> None:
        watched = {name: p for name, p in trained.items() if id(p) in held} or trained
        self._trained = {name: _Watched(p, local(p).clone()) for name, p in watched.items()}
        self._alike = [copy.followers for copy in alike]
        # What has the layout of a trained part and other values may be a teacher, or be no copy at all.
        lookalikes = [name for copy in copies if not copy.began_equal for name in copy.followers]
        self._unheld = {name: p for name, p in trained.items() if id(p) not in held and within(name, lookalikes)}
        self._reached: dict[str, Tensor] = {}  # what no optimizer has and got a gradient, as it was then
        self._batches = self._steps = 0
        self._checked = False

    def before_step(self, learning_rates: Mapping[int, float], waiting: Collection[int]) -> None:
        """Notes which parameters have a gradient, ahead of a step of an optimizer.

        A hook on each parameter would see less: FSDP sets gradients without letting them accumulate. Both arguments are
        by `id`: the learning rate of each parameter that the optimizer has, and what only other optimizers have.
        """
        for each in self._trained.values():
            each.steps += id(each.parameter) not in waiting
            each.lacks_rate &= not learning_rates.get(id(each.parameter), math.inf) > 0
            # Where none of it is on this process, there is no gradient to miss.
            each.lacks_gradient &= each.parameter.grad is None and each.start.numel() > 0
        reached = {name: p for name, p in self._unheld.items() if p.grad is not None and name not in self._reached}
        self._reached |= {name: local(p).clone() for name, p in reached.items()}

    def after_step(self, learning_rates: Iterable[float]) -> bool:
        """Checks what a batch with a step has changed; returns whether there is more to watch.

        An optimizer that steps seldom is waited for, as that of a generator whose critic makes several steps before.
        The learning rates are those of all parameter groups, as the batch found them.

        Raises:
            StateError: If no trainable tensor got a gradient.
        """
        self._batches += 1
        if self._trained and not self._any_steps():
            return True
        self._steps += min(learning_rates, default=0.0) > 0
        is_patient = self._steps < PATIENCE
        fewest = min((each.steps for each in self._trained.values()), default=STEPS)
        if fewest or not is_patient:
            self._check_gradients()
        if self._steps < STEPS:
            return True
        unmoved = self._unmoved()
        if is_patient and (unmoved or fewest < STEPS):
            return True
        self._name_unmoved(unmoved)
        self._name_unheld()
        return False

    def finish(self) -> None:
        """Names what a short run has left as it was, or its learning rate of zero, unless there was a single step."""
        if self._batches:
            self._check_gradients()
        if self._steps >= STEPS:
            self._name_unmoved(self._unmoved())
            self._name_unheld()
        if not self._any_steps() and self._batches >= PATIENCE:
            self._name_idle()
        without_rate = sorted(name for name, each in self._trained.items() if each.lacks_rate)
        if without_rate and self._batches >= STEPS:
            rank_zero_warn(
                f"{len(without_rate)} of {len(self._trained)} trainable tensors were not trained: the learning "
                f"rate of their parameter groups was 0 in all steps: {listing(without_rate)}. Set it in "
                "configure_optimizers, by a scheduler or by the callback that the package has for it; if they are not "
                "to be trained, leave them out of the adapter with exclude_modules."
            )

    def _any_steps(self) -> bool:
        return any(each.steps for each in self._trained.values())

    def _to_change(self) -> dict[str, _Watched]:
        """Returns those that have to get a gradient and change."""
        return {name: each for name, each in self._trained.items() if not each.may_stay}

    def _check_gradients(self) -> None:
        if self._checked:
            return
        self._checked = True
        for each in self._trained.values():
            each.lacks_gradient &= each.steps > 0 and each.parameter.requires_grad
        for parts in self._alike:
            insides = [[each for name, each in self._trained.items() if within(name, [part])] for part in parts]
            still = (inside for inside in insides if all(each.lacks_gradient and not each.may_stay for each in inside))
            for each in next(still, ()):
                each.may_stay = True
        to_change = self._to_change()
        without = sorted(name for name, each in to_change.items() if each.lacks_gradient)
        if without and len(without) == len(to_change):
            raise StateError(f"No trainable tensor got a gradient: {listing(to_change)}. {_NO_GRADIENT}")
        if without:
            rank_zero_warn(
                f"{len(without)} of {len(to_change)} trainable tensors got no gradient in the first step: "
                f"{listing(without)}. {_NO_GRADIENT} If that is meant, leave them out of the "
                "adapter with exclude_modules."
            )

    def _unmoved(self, least: int = STEPS) -> list[str]:
        return [
            name
            for name, each in self._to_change().items()
            if not each.lacks_gradient
            and each.steps >= least
            and each.start.numel()
            and each.parameter.requires_grad
            and torch.equal(local(each.parameter), each.start)
        ]

    def _name_unmoved(self, unmoved: Sequence[str]) -> None:
        if unmoved:
            rank_zero_warn(
                f"{len(unmoved)} of {len(self._to_change())} trainable tensors did not move in {self._steps} steps "
                f"although they have gradients: {listing(unmoved)}. Likely causes: a learning rate too small for their "
                "type, or gradients that are exactly zero."
            )

    def _name_unheld(self) -> None:
        """Names what may be part of a teacher, since its layers are those of a trained part, or learns nothing."""
        left = [name for name, start in self._reached.items() if torch.equal(local(self._unheld[name]), start)]
        if left:
            rank_zero_warn(
                f"{counted(len(left), 'trainable tensor of adapters is', 'trainable tensors of adapters are')} in no "
                f"optimizer, got gradients, and did not move in {self._steps} steps: {listing(left, 3)}. Give the "
                "optimizer what is to be trained, in configure_optimizers; compute a teacher, which the module moves "
                "by itself, under torch.no_grad(); and leave out layers that are to stay, with exclude_modules."
            )

    def _name_idle(self) -> None:
        idle = self._unmoved(least=0)  # not what an optimizer has moved that Lightning does not know of
        if idle:
            rank_zero_warn(
                f"{len(idle)} of {len(self._trained)} trainable tensors were not trained: other optimizers made steps "
                f"in {self._batches} batches, and theirs made none: {listing(idle)}. Call its step() in training_step."
            )
