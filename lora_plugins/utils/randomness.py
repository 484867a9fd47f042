"""Isolated random numbers: what is drawn inside a block neither depends on nor changes those of the run."""

import hashlib
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_plugins.utils.ending import ending

_SEEDING = threading.RLock()
"""Held while the generators, which all threads share, are not as the run has them."""


@contextmanager
def own_randomness(seed: int, model: nn.Module | None = None, loader: Any = None) -> Iterator[None]:
    """Seeds every source of random numbers for the duration of a block, and gives each its state back.

    Those are torch's on the CPU and on the model's devices, Python's, NumPy's where it is in use, and the generators
    that a DataLoader and its samplers were given. All threads share most of them: one that wants to seed them waits.

    Args:
        seed: The seed; at least 0.
        model: What runs in the block; its devices matter.
        loader: What is read in the block.
    """
    with _SEEDING:
        yield from _own_randomness(seed, model, loader)


def _own_randomness(seed: int, model: nn.Module | None, loader: Any) -> Iterator[None]:
    devices = {p.device for p in model.parameters()} if model is not None else set()
    beside = {device: module for device in devices if (module := random_module(device)) is not None}
    numpy = sys.modules.get("numpy.random")
    kept = [(generator, generator.get_state()) for generator in _generators(loader)]
    states = {device: module.get_rng_state(device) for device, module in beside.items()}
    python, others = random.getstate(), numpy.get_state() if numpy else None
    cpu = torch.get_rng_state()

    def put_back() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if numpy:
            numpy.set_state(others)
        for generator, state in kept:
            generator.set_state(state)
        for device, module in beside.items():
            module.set_rng_state(states[device], device)

    with ending(put_back):
        # Not torch.manual_seed, which seeds every device, those too that are not restored.
        torch.default_generator.manual_seed(seed)
        for device, module in beside.items():
            module.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        random.seed(seed)
        if numpy:
            numpy.seed(seed % 2**32)
        yield


def random_module(device: torch.device) -> Any:
    """Returns torch's module of a kind of devices that have random numbers of their own, such as `torch.cuda`.

    None for the CPU, whose are torch's own, and for meta. torch has one for kinds that others add to it, too.
    """
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def run_seed(name: str) -> int:
    """Returns the seed that a name has in this run, whatever was drawn before."""
    with _SEEDING:
        seed = torch.initial_seed()
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Lets functions of torch that take no generator draw on the CPU as `generator`, freshly seeded, would."""
    with _SEEDING, ending(partial(torch.set_rng_state, torch.get_rng_state())):
        torch.default_generator.manual_seed(generator.initial_seed())
        yield


def _generators(loader: Any) -> Iterable[torch.Generator]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in (loader, *samplers)]
    return {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
