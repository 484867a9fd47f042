"""Training: the base of all tasks, with losses, optimization, and the provenance that a fit writes into its files.

From that provenance, `inference` loads a task again.
"""

from lora_plugins.tasks.training.base_task import BaseTask, task_of_checkpoint
from lora_plugins.tasks.training.losses import CROSS_ENTROPY, SMP_LOSSES, Objective, balanced_weights
from lora_plugins.tasks.training.modes import eval_mode, evaluated_on
from lora_plugins.tasks.training.optimization import OptimizerCallable, SchedulerCallable, warmup_cosine
from lora_plugins.tasks.training.provenance import METADATA_KEY, PROVENANCE_KEY, Provenance
from lora_plugins.tasks.training.refused_sizes import is_of_sizes
from lora_plugins.tasks.training.vision_task import CONFUSION, VisionTask
from lora_plugins.tasks.training.what_follows import next_steps

__all__ = [
    "CONFUSION",
    "CROSS_ENTROPY",
    "METADATA_KEY",
    "PROVENANCE_KEY",
    "SMP_LOSSES",
    "BaseTask",
    "Objective",
    "OptimizerCallable",
    "Provenance",
    "SchedulerCallable",
    "VisionTask",
    "balanced_weights",
    "eval_mode",
    "evaluated_on",
    "is_of_sizes",
    "next_steps",
    "task_of_checkpoint",
    "warmup_cosine",
]
