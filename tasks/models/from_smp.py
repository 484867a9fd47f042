"""Decoders of segmentation-models-pytorch over its own and over timm's encoders.

https://github.com/qubvel-org/segmentation_models.pytorch; an encoder of timm is written `tu-` and its timm name.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

from torch import Tensor, nn

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unfetched, unknown
from lora_plugins.tasks.models.from_timm import check_name
from lora_plugins.tasks.models.model_config import ModelConfig, building, check_options_of
from lora_plugins.tasks.models.network import Network, children_except, is_inside
from lora_plugins.tasks.models.weights import NONE, PRETRAINED, load_strict, read_weights

TIMM = "tu-"
ENCODER = "encoder"


def build_segmenter(config: ModelConfig) -> Network:
    """Builds a decoder over an encoder, with `config.num_classes` output channels.

    Raises:
        ConfigError: For an unknown decoder or encoder, or for options that the decoder does not take.
        WeightsError: If the weights of a file do not fit.
    """
    module = _create(config)
    heads = children_except(module, ENCODER)
    if config.weights not in (NONE, PRETRAINED):
        state = _of_encoder(read_weights(config.weights), module.state_dict())
        heads = load_strict(module, state, heads=heads, base=ENCODER, where=repr(config.weights))
    return Network(module.train(), heads, *_own_normalization(config))


def _of_encoder(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the network's names, where the file is of the encoder alone, or of a timm classifier.

    A network of features that timm makes of a classifier has the classifier's names with `_` for some `.`, and leaves
    its last layers out. So a file is of the encoder if it holds each of the encoder's tensors under such a name; what
    else it holds is of the layers that were left out.
    """
    in_file = {key.replace(".", "_"): key for key in state}
    encoder = [key for key in own if is_inside(key, [ENCODER])]
    if any(is_inside(key, [ENCODER]) for key in state) or len(in_file) < len(state):
        return dict(state)
    for prefix in (f"{ENCODER}.model.", f"{ENCODER}."):
        names = {key: in_file.get(key.removeprefix(prefix).replace(".", "_"), "") for key in encoder}
        if all(names.values()):
            return {key: state[name] for key, name in names.items()}
    return dict(state)


def _create(config: ModelConfig) -> nn.Module:
    import segmentation_models_pytorch as smp

    decoders = {cls.__name__: cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if config.name not in decoders:
        raise unknown("decoder of segmentation-models-pytorch:", config.name, decoders)
    encoder = _encoder(config)
    # A decoder passes unknown options on to its encoder: timm's encoders refuse them, smp's own ignore them.
    if not encoder.startswith(TIMM):
        check_options_of("smp's", config, signature(decoders[config.name]).parameters)
    weights = "imagenet" if config.weights == PRETRAINED else None
    try:
        with building(config):
            return cast(
                nn.Module,
                decoders[config.name](encoder_weights=weights, classes=config.num_classes, **config.options),
            )
    except OSError as error:
        raise unfetched(f"the encoder {encoder}", error) from error


def _encoder(config: ModelConfig) -> str:
    from segmentation_models_pytorch.encoders import get_encoder_names

    encoder = config.options.get("encoder_name")
    if not isinstance(encoder, str):
        raise ConfigError(f"smp's {config.name} needs an encoder: options: {{encoder_name: tu-resnet18}}, for example.")
    if encoder.startswith(TIMM):
        check_name(encoder.removeprefix(TIMM))
    elif encoder not in get_encoder_names():
        raise unknown("encoder of segmentation-models-pytorch:", encoder, get_encoder_names())
    return encoder


def _own_normalization(config: ModelConfig) -> tuple[Any, Any]:
    """Mean and std of the encoder's pretrained weights; smp's own encoders have theirs on the hub."""
    encoder = _encoder(config)
    if encoder.startswith(TIMM):
        import timm

        cfg = timm.get_pretrained_cfg(encoder.removeprefix(TIMM))
        return (cfg.mean, cfg.std) if cfg else (None, None)
    if config.mean is not None or config.weights != PRETRAINED:
        return None, None
    from segmentation_models_pytorch.encoders import get_preprocessing_params

    own = get_preprocessing_params(encoder)
    return tuple(own["mean"]), tuple(own["std"])
