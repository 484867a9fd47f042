"""Detects images that are too small for a network: they shrink to a pixel before layers that look at neighborhoods."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_plugins import ConfigError

_MAPS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_DIMS = 4
"""Of a batch of maps: images, channels, height, width."""


@contextmanager
def refusing_small_images(network: nn.Module, name: str, made_for: tuple[int, int] | None) -> Iterator[None]:
    """Watches the feature maps inside the block, and reports at its end the layer where nothing was left of them.

    Such a network computes, and is trained without an error; what it learns has next to nothing to do with the images.

    Raises:
        ConfigError: If a layer with a stride is given a map of one pixel, or the first one leaves a single patch.
    """
    found: list[str] = []
    strided = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, _MAPS) and _strides(layer)]

    def look(path: str, first: bool, _: nn.Module, given: tuple[Any, ...], left: Any) -> None:
        if given and (_is_pixel(given[0]) or (first and _is_pixel(left))):
            found.append(path)

    with ExitStack() as hooks:
        for number, (path, layer) in enumerate(strided):
            hooks.callback(layer.register_forward_hook(partial(look, path, number == 0)).remove)
        yield
    if found:
        usual = "" if made_for is None else f" It was made for images of {made_for[0]}x{made_for[1]}."
        raise ConfigError(
            f"The images are too small for {name}: one pixel or patch is left of them at {found[0]}.{usual} Choose a "
            "larger data.init_args.image_size (--image-size of train), or another model."
        )


def _strides(layer: Any) -> bool:
    stride = layer.stride
    return any(step > 1 for step in (stride if isinstance(stride, tuple) else (stride,)))


def _is_pixel(maps: Any) -> bool:
    return isinstance(maps, Tensor) and maps.ndim == _DIMS and tuple(maps.shape[-2:]) == (1, 1)
