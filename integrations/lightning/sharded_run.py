"""A run whose strategy splits tensors over processes: what differs, and what is left out.

The module is adapted before it is sharded, in every stage. No process has whole tensors, so what compares them is left
out: copies of networks, what the module writes into its base before training, and what changes after it.
"""

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_plugins import LoraConfig, Plan
from lora_plugins.integrations.lightning.module import NetworkCopy, Start
from lora_plugins.integrations.lightning.run import Run
from lora_plugins.integrations.lightning.shims import MethodShims
from lora_plugins.integrations.lightning.strategies import (
    AdaptBeforeSharding,
    after_building,
    check_shardable,
    start_as_first,
    take_type_of_precision,
)
from lora_plugins.integrations.lightning.training import LeftOut


class ShardedRun(Run):
    """A run in which each process has a shard of every tensor."""

    def adapts_in(self, stage: str) -> bool:
        """Says yes to every stage: a checkpoint is loaded into shards, and puts no adapter on."""
        return True

    def follow_building(self, shims: MethodShims, module: LightningModule) -> None:
        """Leaves layers alone that are built again: they would be adapted after they are sharded."""

    def adapt_when_built(
        self, shims: MethodShims, module: LightningModule, target: str | None, adapter: str, adapt: Callable[[], None]
    ) -> None:
        """Adapts the module before its `configure_model`, which may shard it, or after `setup` if it has none."""
        sharding = AdaptBeforeSharding(module, target, adapter, adapt)
        after_building(shims, module, sharding.after, sharding.before)

    def check_addable(self, trainer: Trainer, target: nn.Module, config: LoraConfig) -> None:
        """Checks that the module can be sharded with such an adapter.

        Raises:
            StateError: If it cannot.
        """
        check_shardable(target, config, trainer)

    def start_adapter(self, trainer: Trainer, module: LightningModule, target: nn.Module, adapter: str) -> None:
        """Lets an adapter start alike in all processes, and in the type that the module is about to get."""
        take_type_of_precision(target, adapter, trainer)
        start_as_first(target, adapter, trainer)

    def copies(self, module: LightningModule) -> list[NetworkCopy]:
        """Returns none."""
        return []

    def note_adapted(self, module: LightningModule) -> Start:
        """Records nothing."""
        return Start()

    def find_left_out(self, module: LightningModule, target: str | None, plan: Plan) -> LeftOut:
        """Looks for nothing."""
        return LeftOut()

    def copies_to_watch(self, trainer: Trainer, module: LightningModule) -> list[NetworkCopy]:
        """Returns none."""
        return []

    def held(self, module: LightningModule, target: str, leaves_files: bool) -> dict[str, Tensor]:
        """Returns nothing."""
        return {}
