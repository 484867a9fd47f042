"""Merging, each time in a new process: its cost depends on the memory that a process has already."""

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import torch

from benchmarks.speed.cases import Case, vit, vit_large
from benchmarks.speed.variants import installed, ours, peft
from lora_plugins import LoraModel

PROCESSES = 3
"""New processes for each number."""

_MAXRSS = 2**10 if sys.platform == "linux" else 1
"""Bytes of its unit, which is another one on macOS."""

_CASES = {"ViT-S": vit, "ViT-L": vit_large}


def rows() -> list[tuple[str, str, str]]:
    """Returns name, ours and PEFT's: the time over that of a plain copy of the weights, and the further memory."""
    small, large = _costs("ViT-S", "merge_and_unload"), _costs("ViT-L", "merge_and_unload")
    peaks = {name: f"{peak / 2**20:.0f}" for name, (_, peak) in large.items()}
    return [
        ("merge for good, ViT-S (ratio to a plain copy)", *_ratios(small)),
        ("merge for good, ViT-L (ratio to a plain copy)", *_ratios(large)),
        (f"same, further memory (MiB; the copy {peaks['copy']})", peaks["ours"], peaks.get("peft", "")),
        ("merge for now, ViT-S (ratio to a plain copy)", *_ratios(_costs("ViT-S", "merge_adapter"))),
    ]


def _ratios(costs: dict[str, tuple[float, float]]) -> tuple[str, str]:
    ratios = {name: f"{seconds / costs['copy'][0]:.1f}" for name, (seconds, _) in costs.items()}
    return ratios["ours"], ratios.get("peft", "")


def _costs(model: str, method: str) -> dict[str, tuple[float, float]]:
    """Returns medians of seconds and of further bytes, by what is done."""
    names = ["copy", *(name for name in ("ours", "peft") if name in installed())]
    jobs = [(model, method, name, torch.get_num_threads()) for name in names] * PROCESSES
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        costs = list(pool.map(_cost, *zip(*jobs, strict=True)))
    own = {name: costs[i :: len(names)] for i, name in enumerate(names)}
    return {name: (median(cost[0] for cost in of), median(cost[1] for cost in of)) for name, of in own.items()}


def _cost(model: str, method: str, name: str, threads: int) -> tuple[float, int]:
    """Returns seconds and further memory in bytes; runs in a new process."""
    torch.set_num_threads(threads)
    action = _ACTIONS[name](_CASES[model](), method)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    del result
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * _MAXRSS


def _copying(case: Case, _: str) -> Callable[[], object]:
    model = case.model()
    weights = [model.get_parameter(f"{name}.weight").detach() for name in case.target_names(model)]
    return lambda: [weight.clone() for weight in weights]


_ACTIONS: dict[str, Callable[[Case, str], Callable[[], object]]] = {
    "copy": _copying,
    "ours": lambda case, method: getattr(LoraModel(ours(case, 0.0)), method),
    "peft": lambda case, method: getattr(peft(case, 0.0), method),
}
"""By the name of a library: makes, of a case and the name of a method, the call that is measured."""
