"""Training: optimizers, learning rates, the data of inits, averages, and an audit of what changes.

Depends on `module`, `shims` and `strategies`.
"""

from lora_plugins.integrations.lightning.training.audit import Audit
from lora_plugins.integrations.lightning.training.averages import (
    check_averages,
    copy_into_averages,
    drop_averages,
    keep_base_of_averages,
    put_back_statistics,
    start_averages_from,
)
from lora_plugins.integrations.lightning.training.calibration_data import (
    adapt_after_restoring,
    calibrate_on_train_batches,
    needs_data,
    stores_changed_base,
)
from lora_plugins.integrations.lightning.training.explained_errors import (
    explain_error_of_torch,
    explain_merged_module,
    explain_missing_gradient,
    explain_plain_network,
)
from lora_plugins.integrations.lightning.training.frozen_base import check_backbone, freeze_again, frozen_names
from lora_plugins.integrations.lightning.training.hidden_factors import retry_without_factors
from lora_plugins.integrations.lightning.training.late_changes import LateChanges
from lora_plugins.integrations.lightning.training.learning_rates import LearningRates, parameter_groups
from lora_plugins.integrations.lightning.training.left_out import LeftOut
from lora_plugins.integrations.lightning.training.lost_writes import LostWrites
from lora_plugins.integrations.lightning.training.optimizer_groups import (
    complete_optimizers,
    parameters_of,
)
from lora_plugins.integrations.lightning.training.random_state import ResumedState, random_numbers
from lora_plugins.integrations.lightning.training.trained_batches import check_trained

__all__ = [
    "Audit",
    "LateChanges",
    "LearningRates",
    "LeftOut",
    "LostWrites",
    "ResumedState",
    "adapt_after_restoring",
    "calibrate_on_train_batches",
    "check_averages",
    "check_backbone",
    "check_trained",
    "complete_optimizers",
    "copy_into_averages",
    "drop_averages",
    "explain_error_of_torch",
    "explain_merged_module",
    "explain_missing_gradient",
    "explain_plain_network",
    "freeze_again",
    "frozen_names",
    "keep_base_of_averages",
    "needs_data",
    "parameter_groups",
    "parameters_of",
    "put_back_statistics",
    "random_numbers",
    "retry_without_factors",
    "start_averages_from",
    "stores_changed_base",
]
