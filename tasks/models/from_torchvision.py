"""Semantic segmenters of torchvision: DeepLabV3, FCN and LR-ASPP (https://docs.pytorch.org/vision/stable/models.html).

Their auxiliary classifier, which is only for a second loss, is left out.
"""

from inspect import signature
from typing import Any, cast

from torch import Tensor, nn

from lora_plugins.tasks.errors import unfetched, unknown
from lora_plugins.tasks.models.model_config import ModelConfig, building, check_options_of
from lora_plugins.tasks.models.network import Network
from lora_plugins.tasks.models.weights import NONE, PRETRAINED, load_strict, read_weights

HEAD, BACKBONE, AUXILIARY = "classifier", "backbone", "aux_classifier"


def build_segmenter(config: ModelConfig) -> Network:
    """Builds a segmenter of torchvision with `config.num_classes` output channels.

    Raises:
        ConfigError: For an unknown name, options that the architecture does not take, or weights out of reach.
        WeightsError: If the weights of a file do not fit.
    """
    module = _create(config)
    new: tuple[str, ...] = (HEAD,)
    if config.weights != NONE:
        state = _published_weights(config.name) if config.weights == PRETRAINED else read_weights(config.weights)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{AUXILIARY}.")}
        new = load_strict(module, state, heads=new, base=BACKBONE, where=repr(config.weights))
    own = _default_weights(config.name).transforms()
    side = int(own.resize_size[0])
    return Network(module.train(), new, tuple(own.mean), tuple(own.std), (side, side), own.interpolation.value)


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Calls the network: images (N, channels, H, W) to logits (N, classes, H, W)."""
    return cast(Tensor, network(images)["out"])


def _create(config: ModelConfig) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models, segmentation

    names = list_models(module=segmentation)
    if config.name not in names:
        raise unknown("segmenter of torchvision:", config.name, names)
    # What comes as one of its `kwargs`, torchvision passes over.
    check_options_of("torchvision's", config, signature(get_model_builder(config.name)).parameters.keys() - {"kwargs"})
    keywords = {"weights": None, "weights_backbone": None, "num_classes": config.num_classes, **config.options}
    with building(config):
        module = get_model(config.name, **keywords)
    if hasattr(module, AUXILIARY):
        module.aux_classifier = None
    return cast(nn.Module, module)


def _default_weights(name: str) -> Any:
    from torchvision.models import get_model_weights

    return get_model_weights(name).DEFAULT


def _published_weights(name: str) -> dict[str, Tensor]:
    try:
        return dict(_default_weights(name).get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise unfetched(f"torchvision's {name}", error) from error
