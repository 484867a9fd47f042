"""One message for the many errors by which networks refuse images of a size that is none for them."""

import re

import torch
from torch import Tensor

from lora_plugins import ConfigError, LoraError
from lora_plugins.errors import sentence

_OF_SIZES = re.compile("height|width|shape|size", re.IGNORECASE)


def is_of_sizes(error: Exception) -> bool:
    """Whether an error is one that networks raise, and says something of sizes."""
    is_of_network = isinstance(error, AssertionError | ValueError | RuntimeError)
    is_known = isinstance(error, LoraError | torch.OutOfMemoryError)
    return is_of_network and not is_known and bool(_OF_SIZES.search(str(error)))


def refused_size(name: str, images: Tensor, error: Exception) -> ConfigError:
    """Returns the error that says what a network made of images (N, channels, H, W), and what to choose instead."""
    height, width = images.shape[-2:]
    alone = ", a larger data.init_args.batch_size (--batch-size of train)" if len(images) == 1 else ""
    return ConfigError(
        f"{name} fails on images of {height}x{width}: {sentence(error)} If that is no size for it, choose another "
        f"data.init_args.image_size (--image-size of train){alone}, or another model."
    )
