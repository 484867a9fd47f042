"""Networks of timm, transformers, torchvision and segmentation-models-pytorch, with weights and a new head.

`build_network` builds what a `ModelConfig` describes, and says which modules are new and what its images look like.
"""

from lora_plugins.tasks.models.checkpointing import enable_checkpointing
from lora_plugins.tasks.models.installed_weights import INSTALLED, installed_file
from lora_plugins.tasks.models.lora_targets import default_targets
from lora_plugins.tasks.models.model_config import AUTO, ModelConfig, read_model_config
from lora_plugins.tasks.models.network import Network
from lora_plugins.tasks.models.new_head import class_dependent_modules
from lora_plugins.tasks.models.small_images import refusing_small_images
from lora_plugins.tasks.models.sources import CLASSIFIERS, SEGMENTERS, Source, build_network, source_of
from lora_plugins.tasks.models.weights import NONE, packaged_weights

__all__ = [
    "AUTO",
    "CLASSIFIERS",
    "INSTALLED",
    "NONE",
    "SEGMENTERS",
    "ModelConfig",
    "Network",
    "Source",
    "build_network",
    "class_dependent_modules",
    "default_targets",
    "enable_checkpointing",
    "installed_file",
    "packaged_weights",
    "read_model_config",
    "refusing_small_images",
    "source_of",
]
