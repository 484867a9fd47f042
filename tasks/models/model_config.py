"""Which network a task trains, in values that a YAML file can hold."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from lora_plugins import ConfigError, LoraError
from lora_plugins.errors import sentence
from lora_plugins.field_checks import (
    Check,
    check_count,
    check_fields,
    check_name,
    check_options,
    choice_of,
    number_from,
    optional,
    shown,
)
from lora_plugins.tasks.argument_checks import instance_of
from lora_plugins.tasks.errors import unknown

AUTO, TRAIN, NEW = "auto", "train", "new"
HEADS = (AUTO, TRAIN, NEW)


@dataclass(frozen=True)
class ModelConfig:
    """Which network to build, and from which weights.

    Attributes:
        source: The library that owns the architecture: `timm` and `transformers` (classification), `transformers`,
            `smp` (segmentation-models-pytorch) and `torchvision` (segmentation).
        name: The architecture. For `timm` a model name, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`; for `transformers`
            a model type such as `segformer` (built from `options`), a hub name or a local folder with a `config.json`;
            for `smp` a decoder such as `Unet`; for `torchvision` a name such as `deeplabv3_resnet50`.
        num_classes: The number of classes.
        weights: `pretrained` for the hub's weights (for `smp`: of the encoder), the path of a safetensors file or of
            a folder with a `model.safetensors`, `package:NAME` for weights that are shipped with this package or, as
            `package:tf_efficientnet_lite0`, come along with its extra `vision`, and `none` for random ones.
        head: What to do with the layers whose shape depends on `num_classes`, if the weights have such layers for the
            same number of classes. `auto` keeps them as they are, `train` keeps them and trains them in full, `new`
            initializes them anew. If the weights have none that fit, they are new in any case.
        options: Arguments of the architecture: keywords of `timm.create_model`, fields of the transformers
            configuration, or keywords of the decoder (`encoder_name: tu-resnet18`, ...).
        mean: Mean of each channel, for images in [0, 1]. By default, what the model's own configuration says.
        std: Standard deviation of each channel, likewise.

    Raises:
        ConfigError: For a class count below 1, an unknown `head`, or a `mean` and a `std` that do not go together.
    """

    source: str
    name: str
    num_classes: int
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    head: str = AUTO

    def __post_init__(self) -> None:
        check_fields(vars(self), _CHECKS)
        if (self.mean is None) != (self.std is None):
            raise ConfigError(f"mean is {self.mean} and std is {self.std}: give both, or neither.")
        if self.std is not None and (len(self.std) != len(self.mean or ()) or min(self.std) <= 0):
            raise ConfigError(
                f"std is {self.std}: it needs one positive number a channel, as many as mean {self.mean}."
            )


def read_model_config(given: object) -> ModelConfig:
    """Returns the configuration of a model, given as one or, as in a checkpoint, as its fields.

    Raises:
        ConfigError: If it is something else.
    """
    if not isinstance(given, Mapping):
        instance_of(ModelConfig)("model", given)
        return cast(ModelConfig, given)
    try:
        return ModelConfig(**given)
    except TypeError as error:
        raise ConfigError(
            f"model is {shown(given)}, and has to hold the fields of a ModelConfig: {sentence(error)}"
        ) from error


def _check_channels(name: str, value: Any) -> None:
    """A number for each channel."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is a list of numbers, one a channel, not {shown(value)}.")
    for channel, number in enumerate(value):
        number_from(-math.inf)(f"{name}[{channel}]", number)


def _check_weights(name: str, value: Any) -> None:
    """A word, or a path as a text."""
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{name} is {shown(value)}. It is a text: `pretrained`, `none` for random ones, `package:NAME`, or a path."
        )


_CHECKS: Mapping[str, Check] = {
    "source": check_name,
    "name": check_name,
    "num_classes": check_count,
    "weights": _check_weights,
    "options": check_options,
    "mean": optional(_check_channels),
    "std": optional(_check_channels),
    "head": choice_of(*HEADS),
}
"""What the fields can be, by name; that there is such a source is checked by whoever builds the network."""


def check_options_of(library: str, config: ModelConfig, known: Collection[str]) -> None:
    """Refuses options that a library, such as `smp's`, would pass over.

    Raises:
        ConfigError: Of the first that it does not know, with near names.
    """
    for option in config.options:
        if option not in known:
            raise unknown(f"option of {library} {config.name}:", option, known)


@contextmanager
def building(config: ModelConfig) -> Iterator[None]:
    """Tells errors of a library that cannot build a network as one error that names the options.

    Raises:
        ConfigError: For an error of the library, but an OSError: weights cannot be read or fetched then.
    """
    try:
        yield
    except (OSError, LoraError):  # some of which are a ValueError too
        raise
    except Exception as error:
        given = f" with the options {config.options}" if config.options else ""
        said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) or not str(error) else str(error)
        raise ConfigError(f"{config.source}'s {config.name} cannot be built{given}: {said}") from error
