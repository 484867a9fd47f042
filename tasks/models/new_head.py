"""The head: the layers whose shape depends on the number of classes, kept, trained, or initialized anew."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_plugins import ConfigError
from lora_plugins.tasks.models.model_config import AUTO, NEW, ModelConfig
from lora_plugins.tasks.models.network import Network, is_inside
from lora_plugins.tasks.models.weights import NONE

HEAD_STD = 0.01
"""Standard deviation of the weights of a new classifier."""

Build = Callable[[ModelConfig], Network]


def with_head(build: Build, config: ModelConfig) -> Network:
    """Builds a network and treats its head as `config.head` says.

    Raises:
        ConfigError: If a head is asked for and nothing in the network depends on the number of classes.
    """
    network = build(config)
    if network.new_modules and config.weights != NONE:
        _init_small(network.module, network.new_modules, config.num_classes)
    if config.head == AUTO or network.new_modules:
        return network
    names = class_dependent_modules(
        lambda classes: build(replace(config, weights=NONE, num_classes=classes)).module, config.num_classes
    )
    if not names:
        raise ConfigError(f"Nothing in {config.name!r} depends on the number of classes, so it has no head to train.")
    if config.head == NEW:
        fresh = build(replace(config, weights=NONE)).module.state_dict()
        own = network.module.state_dict()
        network.module.load_state_dict(own | {k: fresh[k] for k in own if is_inside(k, names)})
        _init_small(network.module, names, config.num_classes)
    return replace(network, new_modules=names)


def _init_small(module: nn.Module, names: Sequence[str], classes: int) -> None:
    """Initializes new classifiers over pretrained features so that logits start near zero, at the loss of a guess.

    The initialization of some networks is made for training from scratch: that of timm's EfficientNet gives a loss of
    16 on ten classes, and the fastest descent from there ruins the features. See docs/real_pictures.md.
    """
    for layer in (layer for name in names for layer in module.get_submodule(name).modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == classes:
            nn.init.normal_(layer.weight, std=HEAD_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def class_dependent_modules(build: Callable[[int], nn.Module], classes: int) -> tuple[str, ...]:
    """Names of the modules with a parameter whose shape depends on the number of classes.

    They are found by building the network for one class more, on the meta device.
    """
    with torch.device("meta"):
        one, other = (dict(build(number).named_parameters()) for number in (classes, classes + 1))
    return tuple(sorted({name.rpartition(".")[0] for name, p in one.items() if p.shape != other[name].shape}))
