"""Classifiers of timm (https://github.com/huggingface/pytorch-image-models)."""

from typing import Any

from lora_plugins.tasks.errors import unfetched, unknown
from lora_plugins.tasks.models.model_config import ModelConfig, building
from lora_plugins.tasks.models.network import Network
from lora_plugins.tasks.models.weights import NONE, PRETRAINED, load_strict, read_weights


def build_classifier(config: ModelConfig) -> Network:
    """Builds a timm classifier with `config.num_classes` outputs.

    Raises:
        ConfigError: For a name that timm does not know, or options that the architecture does not take.
        WeightsError: If the weights of a file do not fit.
    """
    if config.weights == PRETRAINED:
        module, new = _pretrained(config)
    else:
        module, new = _from_file(config)
    return Network(module.train(), new, **_preprocessing(module, config))


def check_name(name: str) -> None:
    """Checks that timm knows a model name. Names with a scheme (`hf-hub:...`, `local-dir:...`) are left to timm.

    Raises:
        ConfigError: If it does not, with near matches.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())


def _create(config: ModelConfig, **keywords: Any) -> Any:
    import timm

    check_name(config.name)
    try:
        with building(config):
            return timm.create_model(config.name, **config.options, **keywords)
    except OSError as error:
        raise unfetched(f"timm's {config.name}", error) from error


def _pretrained(config: ModelConfig) -> tuple[Any, tuple[str, ...]]:
    # timm loads strictly only if the number of classes is that of its weights, so the head is replaced afterwards.
    module = _create(config, pretrained=True)
    if module.num_classes == config.num_classes:
        return module, ()
    module.reset_classifier(config.num_classes)
    return module, _classifier_names(module)


def _from_file(config: ModelConfig) -> tuple[Any, tuple[str, ...]]:
    module = _create(config, pretrained=False, num_classes=config.num_classes)
    heads = _classifier_names(module)
    if config.weights == NONE:
        return module, heads
    return module, load_strict(module, read_weights(config.weights), heads=heads, base=None, where=repr(config.weights))


def _preprocessing(module: Any, config: ModelConfig) -> dict[str, Any]:
    """How timm says that images are preprocessed; an `img_size` among the options takes precedence."""
    from timm.data.config import resolve_model_data_config

    resolve: Any = resolve_model_data_config  # has no types
    own = resolve(module)
    size = config.options.get("img_size", own["input_size"][-2:])
    size = (size, size) if isinstance(size, int) else tuple(size)
    return {"mean": own["mean"], "std": own["std"], "size": size, "interpolation": own["interpolation"]}


def _classifier_names(module: Any) -> tuple[str, ...]:
    names = module.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)
