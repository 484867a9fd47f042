"""Image classifiers and semantic segmenters of transformers (https://github.com/huggingface/transformers).

Weights go through the library's own loader, which knows older names of tensors. Its report of missing, unexpected and
mismatched keys is then checked as strictly as for any other source.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unknown
from lora_plugins.tasks.models.model_config import ModelConfig, building, check_options_of
from lora_plugins.tasks.models.network import Network, children_except
from lora_plugins.tasks.models.new_head import class_dependent_modules
from lora_plugins.tasks.models.weights import NONE, PRETRAINED, Difference, new_modules, read_weights
from lora_plugins.utils import ending

AUXILIARY_OPTION, AUXILIARY = "use_auxiliary_head", "auxiliary_head."
PROCESSOR = "preprocessor_config.json"
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Names of PIL's numbers for the interpolations that exist for tensors."""


def build(auto_class: str, config: ModelConfig) -> Network:
    """Builds a model of a class such as `AutoModelForImageClassification`, with `config.num_classes` labels.

    Raises:
        ConfigError: For an unknown model type, hub name or folder, or for options its configuration does not take.
        WeightsError: If weights do not fit.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    architecture = _architecture(config, auto)
    with _quiet_library():
        module, new = _load(config, auto, architecture)
    return Network(module.train(), new, **_preprocessing(config, architecture))


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Calls the network: images (N, channels, H, W) to logits (N, classes) or (N, classes, h, w)."""
    return cast(Tensor, network(pixel_values=images).logits)


def _architecture(config: ModelConfig, auto: Any) -> Any:
    """The transformers configuration that `name` and `options` describe, without an auxiliary head.

    The library uses an auxiliary head only in its own loss, which does not have the options of ours.
    """
    if config.options.get(AUXILIARY_OPTION):
        raise ConfigError(f"{config.name}: {AUXILIARY_OPTION} is true; tasks train on the main head's logits alone.")
    architecture = _named_architecture(config, auto)
    if hasattr(architecture, AUXILIARY_OPTION):
        setattr(architecture, AUXILIARY_OPTION, False)
    # For a model type with several model classes, the library looks into this list, which must not be None.
    architecture.architectures = architecture.architectures or []
    return architecture


def _named_architecture(config: ModelConfig, auto: Any) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.name not in CONFIG_MAPPING:
        return _fetched_architecture(config)
    known = {cls.model_type for cls in auto._model_mapping}
    if config.name not in known:
        raise unknown(f"model type for {auto.__name__}:", config.name, known)
    _check_options(config, CONFIG_MAPPING[config.name]())
    return AutoConfig.for_model(config.name, num_labels=config.num_classes, **config.options)


def _fetched_architecture(config: ModelConfig) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "/" not in config.name and not Path(config.name).is_dir():
        types = unknown("model type of transformers", config.name, CONFIG_MAPPING)
        raise ConfigError(f"{types} It is no folder and no model of the hub (OWNER/NAME) either.")
    try:
        architecture = AutoConfig.from_pretrained(config.name, num_labels=config.num_classes, **config.options)
    except OSError as error:
        raise ConfigError(
            f"There is no configuration to be read for {config.name!r}: {_reason(config.name, error)}"
        ) from error
    _check_options(config, architecture)
    return architecture


def _check_options(config: ModelConfig, architecture: Any) -> None:
    # The library passes over what is no field of its configuration, or reads by it.
    check_options_of("transformers'", config, {*architecture.to_dict(), *architecture.attribute_map})


def _load(config: ModelConfig, auto: Any, architecture: Any) -> tuple[Any, tuple[str, ...]]:
    if config.weights == NONE:
        module = _random(config, auto, architecture)
        return module, _heads(module, config, auto)
    reporting = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    if config.weights == PRETRAINED:
        with building(config):
            module, info = _pretrained(config.name, auto, config=architecture, **reporting)
    else:
        cls = type(_random(config, auto, architecture))
        state = read_weights(config.weights)
        module, info = cls.from_pretrained(None, config=architecture, state_dict=state, **reporting)
    difference = Difference(
        missing=frozenset(info["missing_keys"]),
        unexpected=frozenset(key for key in info["unexpected_keys"] if not key.startswith(AUXILIARY)),
        mismatched=tuple((key, tuple(theirs), tuple(ours)) for key, theirs, ours in info["mismatched_keys"]),
    )
    where = repr(config.name if config.weights == PRETRAINED else config.weights)
    heads, keys = _heads(module, config, auto), module.state_dict()
    return module, new_modules(difference, keys, heads=heads, base=_base(module), where=where)


def _random(config: ModelConfig, auto: Any, architecture: Any) -> Any:
    with building(config):
        return auto.from_config(architecture)


def _heads(module: nn.Module, config: ModelConfig, auto: Any) -> tuple[str, ...]:
    """The parts that may be a new head: all but the base, or else what depends on the number of classes."""
    base = _base(module)
    parts = () if base is None else children_except(module, base)
    return parts or class_dependent_modules(
        lambda classes: auto.from_config(_architecture(replace(config, num_classes=classes), auto)),
        config.num_classes,
    )


def _pretrained(name: str, auto: Any, **keywords: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name in CONFIG_MAPPING:
        raise ConfigError(
            f"{name!r} is a model type of transformers, which has no weights of its own: name a model of the hub or a "
            "folder, or give the path of a safetensors file in `weights`."
        )
    try:
        return auto.from_pretrained(name, **keywords)
    except OSError as error:
        reason = _reason(name, error)
        raise ConfigError(f"The pretrained weights {name!r} of transformers could not be read: {reason}") from error


def _reason(name: str, error: OSError) -> str:
    from huggingface_hub import constants

    if Path(name).is_dir() or not constants.HF_HUB_OFFLINE:
        return str(error)
    return (
        "it is not in the cache, and the Hugging Face hub cannot be reached from here. Where it can, run "
        f"`hf download {name} --local-dir FOLDER`, and name FOLDER instead."
    )


def _base(module: nn.Module) -> str | None:
    """Name of the child that is no head: UperNet's prefix is empty, and CLIP's is that of its parent."""
    for name in (module.base_model_prefix, "backbone", "vision_model"):
        if name and hasattr(module, str(name)):
            return str(name)
    return None


def _preprocessing(config: ModelConfig, architecture: Any) -> dict[str, Any]:
    """What the model's image processor says, if there is one; else the image size of the configuration."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    local = Path(config.name)
    if config.name in CONFIG_MAPPING or (local.is_dir() and not (local / PROCESSOR).is_file()):
        return {"mean": None, "std": None, "size": _pair(getattr(architecture, "image_size", None))}
    load: Any = AutoImageProcessor.from_pretrained  # has no types
    processor = load(config.name)
    own, channels = processor.to_dict(), int(getattr(architecture, "num_channels", 3))
    # MobileViT's processor has a mean that it does not use: its `do_normalize` is None, which files leave out.
    normalized = bool(getattr(processor, "do_normalize", False))
    divided = 2 if own.get("include_top") else 1  # EfficientNet's divides by std twice, as in its training
    return {
        "mean": tuple(own["image_mean"]) if normalized else (0.0,) * channels,
        "std": tuple(s**divided for s in own["image_std"]) if normalized else (1.0,) * channels,
        "size": _processed_size(own),
        "interpolation": RESAMPLE.get(own.get("resample"), "bilinear"),
        "bgr": bool(own.get("do_flip_channel_order", False)),
    }


def _processed_size(own: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width that a processor resizes or crops images to."""
    crop = own.get("crop_size") if own.get("do_center_crop") else None
    size: dict[str, Any] = crop or own.get("size") or {}
    if "height" in size:
        return int(size["height"]), int(size["width"])
    return _pair(size.get("shortest_edge"))


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Silences the library's progress bar and load report, which say less than the errors raised here."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging  # has no types

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def put_back() -> None:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

    with ending(put_back):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
