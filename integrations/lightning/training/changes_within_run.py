"""What is changed of adapters and their base while a module is trained: by itself, or by another callback."""

from collections.abc import Sequence, Set

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import LoraModel, StateError
from lora_plugins.adapter import ModelState, adapter_tensors, check_in_place, present_state
from lora_plugins.errors import counted, listing
from lora_plugins.integrations.lightning.module import (
    NetworkCopy,
    adapted_targets,
    built_since,
    built_too_late,
    check_not_replaced,
    frozen_by_others,
    frozen_tensors,
    layers_of_factors,
    trained_parameters,
)
from lora_plugins.integrations.lightning.training.frozen_base import check_in_no_optimizer
from lora_plugins.integrations.lightning.training.optimizer_groups import parameters_of
from lora_plugins.utils import within


class ChangesWithinRun:
    """Warns of each change once, and freezes again what was made trainable of the base.

    `copies` are those of adapted networks that are adapted alike, `teachers` the names of the tensors of adapters that
    were frozen when the module was adapted.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, copies: Sequence[NetworkCopy], teachers: Set[str]
    ) -> None:
        self._trainer, self._module, self._copies = trainer, module, copies
        held, trained = parameters_of(trainer.optimizers), trained_parameters(module)
        self._untrained = {name: p for name, p in trained.items() if id(p) not in held}
        held_names = trained.keys() - self._untrained.keys()
        self._layers = {layer for name, layer in layers_of_factors(module).items() if name in held_names}
        self._frozen_by_others = {*teachers}
        self._once_frozen: set[str] = set()
        self._switched: set[str] = set()
        self._frozen_first: Set[str] | None = None
        self._base: dict[str, nn.Parameter] = {}
        self._trained: list[ModelState] = []
        self._thawed: set[str] = set()
        self._late: list[str] = []

    def before_epoch(self) -> None:
        """Notes what is trained and what is frozen, and names changes of adapters."""
        self._base = {n: p for n, p in frozen_tensors(self._module).items() if isinstance(p, nn.Parameter)}
        held = parameters_of(self._trainer.optimizers)
        targets = adapted_targets(self._module).values()
        self._trained = [present_state(t) for t in targets if any(id(p) in held for p in adapter_tensors(t).values())]
        self.name_adapters()

    def before_batch(self) -> None:
        """Forgets what was frozen in the steps of the last batch."""
        self._frozen_first = None

    def before_step(self) -> None:
        """Notes in the first steps which adapters the module freezes and trains by turns, as a GAN does with its parts.

        What it trains and then freezes counts within one batch only: a callback may freeze it for good in a later one.
        """
        frozen = {*frozen_by_others(self._module)}
        if self._frozen_first is None:
            self._frozen_first = frozen
        self._switched |= (self._once_frozen - frozen) | (frozen - self._frozen_first)
        self._once_frozen |= frozen

    def check_trainable(self) -> None:
        """Checks that adapters which are trained still act in the forward.

        Raises:
            StateError: If a hook has merged some since, as for a validation, and has not unmerged them.
        """
        for state in self._trained:
            state.check("train")

    def check_layers(self) -> None:
        """Names layers that were built since.

        Raises:
            StateError: If they have to be adapted, or adapted layers were replaced, moved or copied.
        """
        for target in adapted_targets(self._module).values():
            for name in LoraModel(target).adapters:
                check_not_replaced(target, name)
                check_in_place(target, present_state(target), name)
        self._check_late_layers()

    def freeze_base(self) -> None:
        """Freezes again what was made trainable of the base, as by GANs that switch gradients, and warns once.

        Raises:
            StateError: If an optimizer trains it.
        """
        thawed = {name: p for name, p in self._base.items() if p.requires_grad}
        if not thawed:
            return
        check_in_no_optimizer(thawed, parameters_of(self._trainer.optimizers))
        for parameter in thawed.values():
            parameter.requires_grad_(False)
            parameter.grad = None  # nobody else would, and clip_grad_norm_ of all parameters counts it
        new = sorted(thawed.keys() - self._thawed)
        self._thawed.update(new)
        if new:
            rank_zero_warn(
                f"{counted(len(new), 'tensor of the frozen base was', 'tensors of the frozen base were')} made "
                f"trainable, as by a GAN that switches the gradients of its parts: {listing(new)}. No optimizer has "
                "them, so they are frozen again ahead of each batch and after each backward of Lightning. If they are "
                "to be trained, list their modules in modules_to_save, or leave them out of `target`."
            )

    def name_adapters(self) -> None:
        """Names what was frozen of adapters, and what was put on, since there are optimizers."""
        self._name_frozen_adapters()
        self._name_new_adapters()

    def _name_frozen_adapters(self) -> None:
        ours = [copy.name for copy in self._copies if copy.frozen and copy.began_equal]
        frozen = {name for name in frozen_by_others(self._module) if not within(name, ours)}
        new = sorted(frozen - self._switched - self._frozen_by_others)
        self._frozen_by_others.update(new)
        if new:
            rank_zero_warn(
                f"{counted(len(new), 'tensor of adapters was', 'tensors of adapters were')} frozen "
                f"(requires_grad=False) after they were added, and are not trained while they are: {listing(new)}. "
                "on_fit_start or configure_optimizers of the module, or a callback such as finetuning-scheduler, does "
                "that. If it is meant, leave their layers out with exclude_modules; else switch that off, as by "
                "freeze_backbone=False: the base stays frozen."
            )

    def _name_new_adapters(self) -> None:
        """Names what was put on layers since their optimizer was made, as `delete_adapter` and `add_adapter` do."""
        held, layers = parameters_of(self._trainer.optimizers), layers_of_factors(self._module)
        of_trained = {name for name, layer in layers.items() if layer in self._layers}
        missing = {n: p for n, p in trained_parameters(self._module).items() if n in of_trained and id(p) not in held}
        new = sorted(name for name, p in missing.items() if self._untrained.get(name) is not p)
        self._untrained.update(missing)
        if new:
            rank_zero_warn(
                f"{counted(len(new), 'trainable tensor of adapters was', 'trainable tensors of adapters were')} put on "
                f"after the optimizers were made, none of which has them, so they are not trained: {listing(new)}. "
                "Give them to one, with optimizer.add_param_group, or make the optimizers anew: "
                "trainer.strategy.setup_optimizers(trainer)."
            )

    def _check_late_layers(self) -> None:
        late = [name for name in built_since(self._module) if name not in self._late]
        if not late:
            return
        self._late += late
        built = "built after the module was adapted, as in its first step or a later epoch"
        way = "Build them in __init__, setup or configure_model, or run the module once before fit"
        # The tensors of FSDP are flat by now, and nothing can be planned. What was built before that was checked then.
        flat = isinstance(self._trainer.strategy, FSDPStrategy)
        if not flat and (meant := built_too_late(self._module)):
            raise StateError(
                f"{listing(meant, 3)} were {built}. The configuration means them as well, so no checkpoint with them "
                f"could be loaded. {way}; or let target_modules name the layers that are to be adapted."
            )
        rank_zero_warn(
            f"{listing(late, 3)} were {built}: they have no adapter, and are trained only if they were given to the "
            f"optimizer. {way}, if they are to be adapted."
        )
