"""Seconds of what is done once, over models of many layers or of much memory.

Of the processor, so that what else runs on the machine does not count; nor does waiting for a disk.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from lora_plugins import LoraConfig, LoraModel

LAYERS = (100, 300, 1000, 3000, 10_000)
WIDTH = 16
BLOCK = 10
"""Layers of a block, so that names are as deep as those of real models."""

CONFIG = LoraConfig(r=4, init="gaussian", target_modules="all")


def many_layers(count: int) -> nn.Module:
    """A model of small layers."""
    blocks = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCK))) for _ in range(count // BLOCK))
    return nn.Sequential(*blocks)


def much_memory(megabytes: int) -> nn.Module:
    """A model of ten layers that take so much memory."""
    width = round((megabytes * 2**20 / 4 / 10) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(10)))


def costs(model: nn.Module) -> dict[str, float]:
    """Returns the processor seconds of each call.

    Args:
        model: An untouched model; it is as before afterwards, except for what merging for good wrote.
    """
    found: dict[str, float] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        gc.collect()
        start = time.process_time()
        action()
        found[name] = time.process_time() - start

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        timed("plan", lambda: LoraModel.plan(model, CONFIG))
        timed("inject", lambda: LoraModel(model, CONFIG))
        lora = LoraModel(model)
        timed("save", lambda: lora.save_adapter(path))
        timed("unload", lora.unload)
        timed("load", lambda: LoraModel.load_adapter(model, path))
        lora = LoraModel(model)
        timed("merge for now", lambda: lora.merge_adapter(max_error=1.0))
        timed("unmerge", lora.unmerge_adapter)
        timed("merge for good", lambda: lora.merge_and_unload(max_error=1.0))
    return found


def over_layers(counts: list[int]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the number of layers, and seconds by call."""
    costs(many_layers(counts[0]))  # what is imported and made once
    for count in counts:
        yield count, costs(many_layers(count))


def over_memory(sizes: list[int]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the megabytes of the model, and seconds by call."""
    costs(much_memory(10))
    for size in sizes:
        yield size, costs(much_memory(size))
