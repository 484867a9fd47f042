"""What belongs to one run of a Trainer, and ends with it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from lora_plugins.integrations.lightning.module import KnownBases
from lora_plugins.integrations.lightning.shims import MethodShims
from lora_plugins.integrations.lightning.training import Audit, LateChanges


@dataclass
class Run:
    """What a LoraCallback holds of one run of a Trainer.

    Attributes:
        module_shims: What stands in for methods of the module.
        strategy_shims: What stands in for methods of the strategy.
        expected_warnings: Holds back warnings about modules in eval mode.
        restored: The callback's state in a checkpoint, until the first batch.
        known_bases: What adapters knew of the base before the rest of that checkpoint was loaded.
        audit: Watches the training, once it has started.
        sums: Checksums of the frozen base at the end of the training, by name.
        late_changes: What was trained, as it is saved and merged.
    """

    module_shims: MethodShims | None = None
    strategy_shims: MethodShims | None = None
    expected_warnings: ExitStack = field(default_factory=ExitStack)
    restored: dict[str, Any] | None = None
    known_bases: KnownBases = field(default_factory=dict)
    audit: Audit | None = None
    sums: dict[str, int] = field(default_factory=dict)
    late_changes: LateChanges | None = None

    def end(self) -> None:
        """Restores the methods, and lets warnings pass."""
        self.expected_warnings.close()
        for shims in (self.module_shims, self.strategy_shims):
            if shims is not None:
                shims.remove()
