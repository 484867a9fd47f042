"""Checks in the first steps that every trainable tensor gets a gradient and changes."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.errors import counted, listing
from lora_plugins.integrations.lightning.module import local
from lora_plugins.utils import within

STEPS = 2
"""Batches with optimizer steps, at a learning rate above zero, after which nearly every trainable tensor has moved."""

PATIENCE = 10
"""Such batches after which one that has not moved is named: RAdam without its phase of SGD makes no step in five."""

_NO_GRADIENT = (
    "Likely causes: the layer is not on the way from the batch to the loss; or it is inside gradient checkpointing "
    "whose input needs no gradient (pass use_reentrant=False to torch.utils.checkpoint)."
)


class FirstSteps:
    """Watches parameters until each has had a gradient and has changed.

    Args:
        trained: The parameters by name.
        copies: Names of equal networks: one of them that has no gradient at all is a teacher or an average.
        unheld: Trainable parameters that no optimizer has, by name, of what has the layout of a trained part and other
            values: it may be a teacher, or be no copy at all.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        copies: Sequence[tuple[str, ...]],
        unheld: Mapping[str, nn.Parameter],
    ) -> None:
        self._trained, self._copies, self._unheld = trained, copies, unheld
        self._without = set(trained)
        self._start = {name: local(p).clone() for name, p in trained.items()}
        self._reached: dict[str, Tensor] = {}  # what no optimizer has and got a gradient, as it was then
        self._batches = self._steps = 0
        self._checked = False
        self._without_rate = set(trained)
        self._made: Counter[str] = Counter()  # the steps that the optimizer of each has made

    def before_step(self, learning_rates: Mapping[int, float], waiting: Collection[int]) -> None:
        """Notes which parameters have a gradient, ahead of a step of an optimizer.

        A hook on each parameter would see less: FSDP sets gradients without letting them accumulate.

        Args:
            learning_rates: Of each parameter that an optimizer has, by its `id`.
            waiting: The `id` of each that this optimizer does not have, and another one has.
        """
        self._made.update(name for name, parameter in self._trained.items() if id(parameter) not in waiting)
        ids = {name: id(self._trained[name]) for name in self._without_rate}
        self._without_rate -= {name for name, key in ids.items() if learning_rates.get(key, math.inf) > 0}
        self._without -= {
            name
            for name in self._without
            if self._trained[name].grad is not None or not self._start[name].numel()  # none of it is on this process
        }
        reached = {name: p for name, p in self._unheld.items() if p.grad is not None and name not in self._reached}
        self._reached |= {name: local(p).clone() for name, p in reached.items()}

    def after_step(self, learning_rates: Iterable[float]) -> bool:
        """Checks what a batch with a step has changed; returns whether there is more to watch.

        An optimizer that steps seldom is waited for, as that of a generator whose critic makes several steps before.

        Args:
            learning_rates: Of all parameter groups, as the batch found them.

        Raises:
            StateError: If no trainable tensor got a gradient.
        """
        self._batches += 1
        if self._trained and not self._made:
            return True
        self._steps += min(learning_rates, default=0.0) > 0
        is_patient = self._steps < PATIENCE
        fewest = min((self._made[name] for name in self._trained), default=STEPS)
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
        if not self._made and self._batches >= PATIENCE:
            self._name_idle()
        if self._without_rate and self._batches >= STEPS:
            rank_zero_warn(
                f"{len(self._without_rate)} of {len(self._trained)} trainable tensors were not trained: the learning "
                f"rate of their parameter groups was 0 in all steps: {listing(sorted(self._without_rate))}. Set it in "
                "configure_optimizers, by a scheduler or by the callback that the package has for it; if they are not "
                "to be trained, leave them out of the adapter with exclude_modules."
            )

    def _check_gradients(self) -> None:
        if self._checked:
            return
        self._checked = True
        self._without = {n for n in self._without if self._made[n] and self._trained[n].requires_grad}
        for parts in self._copies:
            insides = [{name for name in self._trained if within(name, [part])} for part in parts]
            inside = next((inside for inside in insides if inside <= self._without), set())
            self._start = {name: start for name, start in self._start.items() if name not in inside}
            self._without -= inside
        if self._without and len(self._without) == len(self._start):
            raise StateError(f"No trainable tensor got a gradient: {listing(self._start)}. {_NO_GRADIENT}")
        if self._without:
            rank_zero_warn(
                f"{len(self._without)} of {len(self._start)} trainable tensors got no gradient in the first step: "
                f"{listing(sorted(self._without))}. {_NO_GRADIENT} If that is meant, leave them out of the "
                "adapter with exclude_modules."
            )

    def _unmoved(self, least: int = STEPS) -> list[str]:
        return [
            name
            for name, start in self._start.items()
            if name not in self._without
            and self._made[name] >= least
            and start.numel()
            and self._trained[name].requires_grad
            and torch.equal(local(self._trained[name]), start)
        ]

    def _name_unmoved(self, unmoved: Sequence[str]) -> None:
        if unmoved:
            rank_zero_warn(
                f"{len(unmoved)} of {len(self._start)} trainable tensors did not move in {self._steps} steps although "
                f"they have gradients: {listing(unmoved)}. Likely causes: a learning rate too small for their type, or "
                "gradients that are exactly zero."
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
