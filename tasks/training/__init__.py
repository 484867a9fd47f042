"""Training: the task that classification and segmentation share, and its losses.

What a fit leaves behind says which task it is of: `provenance` writes that, `inference` reads it.
"""

from lora_plugins.tasks.training.losses import CROSS_ENTROPY, FROM_SMP, Objective, balanced_weights
from lora_plugins.tasks.training.optimizers import OPTIMIZERS
from lora_plugins.tasks.training.provenance import KEY, METADATA
from lora_plugins.tasks.training.schedules import SCHEDULES, scheduler
from lora_plugins.tasks.training.threads import CpuThreads
from lora_plugins.tasks.training.vision_task import CONFUSION, VisionTask

__all__ = [
    "CONFUSION",
    "CROSS_ENTROPY",
    "FROM_SMP",
    "KEY",
    "METADATA",
    "OPTIMIZERS",
    "SCHEDULES",
    "CpuThreads",
    "Objective",
    "VisionTask",
    "balanced_weights",
    "scheduler",
]
