"""Training: the task that classification and segmentation share, and its losses.

What a fit leaves behind says which task it is of: `provenance` writes that, `inference` reads it.
"""

from lora_plugins.tasks.training.losses import CROSS_ENTROPY, SMP_LOSSES, Objective, balanced_weights
from lora_plugins.tasks.training.optimizers import OPTIMIZERS
from lora_plugins.tasks.training.provenance import METADATA_KEY, PROVENANCE_KEY, Provenance
from lora_plugins.tasks.training.schedules import SCHEDULES, scheduler
from lora_plugins.tasks.training.threads import CpuThreads
from lora_plugins.tasks.training.vision_task import CONFUSION, VisionTask

__all__ = [
    "CONFUSION",
    "CROSS_ENTROPY",
    "METADATA_KEY",
    "OPTIMIZERS",
    "PROVENANCE_KEY",
    "SCHEDULES",
    "SMP_LOSSES",
    "CpuThreads",
    "Objective",
    "Provenance",
    "VisionTask",
    "balanced_weights",
    "scheduler",
]
