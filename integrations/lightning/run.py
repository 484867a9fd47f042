"""What belongs to one run of a Trainer, and ends with it."""

from collections.abc import Callable, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_plugins import LoraConfig, Plan, StateError
from lora_plugins.integrations.lightning.module import (
    KnownBases,
    NetworkCopy,
    Start,
    find_copies,
    note_built,
    put_back_known_bases,
    start_alike,
    take_fingerprints,
    tensors_beside_merges,
    trained_parameters,
)
from lora_plugins.integrations.lightning.shims import MethodShims
from lora_plugins.integrations.lightning.strategies import after_building, follow_building
from lora_plugins.integrations.lightning.training import (
    Audit,
    LateChanges,
    LeftOut,
    LostWrites,
    ResumedState,
    explain_error_of_torch,
    explain_merged_module,
    explain_missing_gradient,
    explain_plain_network,
    keep_base_of_averages,
    parameters_of,
    put_back_statistics,
)
from lora_plugins.utils import within


@dataclass
class Run:
    """What a LoraCallback holds and does in one run of a Trainer. Each process has the whole module.

    A `ShardedRun` is one in which that is not so.

    Attributes:
        shims: What stands in for methods of the module and of the strategy.
        waits: Whether the adapter joins the module after a checkpoint.
        expected_warnings: Holds back warnings about modules in eval mode.
        resumed: The callback's state in a checkpoint, until the first batch.
        known_bases: What adapters knew of the base before the rest of that checkpoint was loaded.
        left_out: What the fit leaves out.
        frozen: The names of what was frozen of the base when its optimizers were to be made.
        teachers: The names of the tensors of adapters that were frozen when the module was adapted.
        lost_writes: Watches what is written into adapted weights, from then to the end of the first steps.
        audit: Watches the training, once it has started.
        sums: Checksums of the frozen base at the end of the training, by name.
        late_changes: What was trained, as it is saved and merged.
    """

    shims: list[MethodShims] = field(default_factory=list)
    waits: bool = False
    expected_warnings: ExitStack = field(default_factory=ExitStack)
    resumed: ResumedState = field(default_factory=ResumedState)
    known_bases: KnownBases = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    frozen: set[str] = field(default_factory=set)
    teachers: set[str] = field(default_factory=set)
    lost_writes: LostWrites = field(default_factory=LostWrites)
    audit: Audit | None = None
    sums: dict[str, int] = field(default_factory=dict)
    late_changes: LateChanges | None = None

    def end(self) -> None:
        """Restores the methods, and lets warnings pass."""
        self.expected_warnings.close()
        self.lost_writes.stop()
        for each in self.shims:
            each.remove()

    def adapts_in(self, stage: str) -> bool:
        """Whether the module is adapted in a stage; in others, the checkpoint brings an adapter, if one is given."""
        return stage == "fit"

    def follow_building(self, shims: MethodShims, module: LightningModule) -> None:
        """Moves adapters onto layers that hooks of the module rebuild."""
        follow_building(shims, module)

    def adapt_when_built(
        self, shims: MethodShims, module: LightningModule, target: str | None, adapter: str, adapt: Callable[[], None]
    ) -> None:
        """Adapts the module after the last hook in which it may build layers."""
        after_building(shims, module, adapt)

    def check_addable(self, trainer: Trainer, target: nn.Module, config: LoraConfig) -> None:
        """Checks that an adapter of a configuration can be added in such a run: any can."""

    def start_adapter(self, trainer: Trainer, module: LightningModule, target: nn.Module, adapter: str) -> None:
        """Lets an adapter that was just added start in copies of a network as in their origins."""
        start_alike(module, self.copies(module), adapter)

    def copies(self, module: LightningModule) -> list[NetworkCopy]:
        """Returns the copies of adapted networks in the module."""
        return find_copies(module)

    def note_adapted(self, module: LightningModule) -> Start:
        """Records the module as it was adapted."""
        note_built(module)
        return Start.of(module)

    def find_left_out(self, module: LightningModule, target: str | None, plan: Plan) -> LeftOut:
        """Returns what the fit leaves out."""
        return LeftOut.of(module, target, plan)

    def keep_base(self, trainer: Trainer, module: LightningModule) -> None:
        """Removes rounding errors from what callbacks have averaged, before they exchange it with the module."""
        if trainer.state.fn == "fit":
            keep_base_of_averages(trainer, module, self.note_moved)

    def note_moved(self) -> None:
        """Records what the module has changed by hand since its training started."""
        if self.audit is not None:
            self.audit.note_moved()

    def before_batch(self, trainer: Trainer, module: LightningModule, number: int, start: Start) -> None:
        """Starts the audit ahead of the first batch of all.

        Raises:
            StateError: If layers that were built since have to be adapted, or adapters are merged.
        """
        self.resumed.forget()
        first = number == 0 or self.audit is None
        if first:
            put_back_known_bases(module, self.known_bases)
            put_back_statistics(trainer, module)
        if self.audit is None:
            copies = self.copies_to_watch(trainer, module)
            self.audit = Audit(trainer, module, copies, start, self.lost_writes, self.teachers)
        self.audit.before_batch(first_of_epoch=first)

    def freeze_base(self) -> None:
        """Keeps the base frozen.

        Raises:
            StateError: If an optimizer trains it.
        """
        if self.audit is not None:
            self.audit.freeze_base()

    def copies_to_watch(self, trainer: Trainer, module: LightningModule) -> list[NetworkCopy]:
        """Returns the copies that are watched from the first batch on, when there are optimizers."""
        note_built(module)  # what was converted since
        take_fingerprints(module)
        return find_copies(module, parameters_of(trainer.optimizers))

    @property
    def written(self) -> Set[str]:
        """The names of what the module has written into its base before the training, or moves by hand in it."""
        return set() if self.audit is None else self.audit.written

    def held(self, module: LightningModule, target: str, leaves_files: bool) -> dict[str, Tensor]:
        """Returns what of a target is not to change after its results, by name: the base where files leave it out."""
        tensors = tensors_beside_merges(module) if leaves_files else trained_parameters(module)
        return {name: tensor for name, tensor in tensors.items() if within(name, [target])}

    def explain(self, trainer: Trainer, error: BaseException, *, merged: bool) -> None:
        """Adds to an error what may have caused it."""
        explain_error_of_torch(error)
        explain_missing_gradient(error)
        if self.late_changes is not None:  # fit has ended
            if merged:
                explain_merged_module(error)
        elif self.audit is not None:
            self.audit.explain(error)
            with suppress(StateError):  # the exception that there is says more
                self.audit.note_moved()  # takes rounding out of copies that the last batch has moved
        elif trainer.state.fn == "fit":  # training has not started: in the sanity check of the validation, say
            explain_plain_network(error)
