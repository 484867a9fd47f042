"""Which library builds which network: one table per task, one row per library."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from lora_plugins.tasks.errors import unknown
from lora_plugins.tasks.hub import cache_where_unreachable
from lora_plugins.tasks.models import from_smp, from_timm, from_torchvision, from_transformers
from lora_plugins.tasks.models.model_config import ModelConfig
from lora_plugins.tasks.models.network import Network
from lora_plugins.tasks.models.new_head import with_head
from lora_plugins.tasks.models.weights import PRETRAINED


def _answer(network: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, network(images))


@dataclass(frozen=True)
class Source:
    """What a task needs from a library.

    Attributes:
        build: Builds the network that a configuration describes.
        logits: Calls such a network on a batch of images and returns its logits; by default, they are its answer.
    """

    build: Callable[[ModelConfig], Network]
    logits: Callable[[nn.Module, Tensor], Tensor] = _answer


CLASSIFIERS: Mapping[str, Source] = {
    "timm": Source(from_timm.build_classifier),
    "transformers": Source(
        partial(from_transformers.build, "AutoModelForImageClassification"), from_transformers.logits
    ),
}
SEGMENTERS: Mapping[str, Source] = {
    "smp": Source(from_smp.build_segmenter),
    "torchvision": Source(from_torchvision.build_segmenter, from_torchvision.logits),
    "transformers": Source(
        partial(from_transformers.build, "AutoModelForSemanticSegmentation"), from_transformers.logits
    ),
}


def build_network(config: ModelConfig, sources: Mapping[str, Source]) -> Network:
    """Builds the network that a configuration describes, with its head as the configuration says.

    Raises:
        ConfigError: For unknown names, or options that do not fit.
        WeightsError: If the weights do not fit.
    """
    build = source_of(config, sources).build
    with cache_where_unreachable() if _asks_hub(config) else nullcontext():
        return with_head(build, config)


def _asks_hub(config: ModelConfig) -> bool:
    of_hub = config.source == "transformers" and "/" in config.name and not Path(config.name).is_dir()
    return of_hub or config.weights == PRETRAINED


def source_of(config: ModelConfig, sources: Mapping[str, Source]) -> Source:
    """The source that a configuration names.

    Raises:
        ConfigError: For a name that is not in the table, with near matches.
    """
    if config.source not in sources:
        raise unknown("source of models", config.source, sources)
    return sources[config.source]
