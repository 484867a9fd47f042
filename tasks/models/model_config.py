"""Which network a task trains, in values that a YAML file can hold."""

from dataclasses import dataclass, field
from typing import Any

from lora_plugins import ConfigError
from lora_plugins.errors import near

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
        if self.num_classes < 1:
            raise ConfigError(f"num_classes is {self.num_classes}; a model needs at least one class.")
        if self.head not in HEADS:
            raise ConfigError(f"head is {self.head!r}. {near(self.head, HEADS)}")
        if (self.mean is None) != (self.std is None):
            raise ConfigError(f"mean is {self.mean} and std is {self.std}: give both, or neither.")
        if self.std is not None and (len(self.std) != len(self.mean or ()) or min(self.std) <= 0):
            raise ConfigError(
                f"std is {self.std}: it needs one positive number a channel, as many as mean {self.mean}."
            )
