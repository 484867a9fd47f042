"""One message for the many errors by which networks refuse images of a size that is none for them."""

import re

import torch
from torch import Tensor

from lora_plugins import ConfigError, LoraError
from lora_plugins.errors import sentence

ERRORS = (AssertionError, ValueError, RuntimeError)
"""What networks raise then."""

_OF_SIZES = re.compile("height|width|shape|size", re.IGNORECASE)


def is_of_sizes(error: Exception) -> bool:
    """Whether an error is one of a network, and says something of sizes."""
    return not isinstance(error, LoraError | torch.OutOfMemoryError) and bool(_OF_SIZES.search(str(error)))


def refused_size(name: str, images: Tensor, error: Exception) -> ConfigError:
    """Returns the error that says what a network made of images (N, channels, H, W), and what to choose instead."""
    height, width = images.shape[-2:]
    alone = ", a larger data.init_args.batch_size (--batch-size of train)" if len(images) == 1 else ""
    return ConfigError(
        f"{name} fails on images of {height}x{width}: {sentence(error)} If that is no size for it, choose another "
        f"data.init_args.image_size (--image-size of train){alone}, or another model."
    )
