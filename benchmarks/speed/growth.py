"""How the cost of a step grows with rank, batch and depth, drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.speed.cases import Case, resnet, vit
from benchmarks.speed.measure import ratio, seconds
from benchmarks.speed.variants import build, installed

Family = tuple[str, Callable[[int], Case], Sequence[int]]

FAMILIES: list[Family] = [
    ("ViT-S: rank", lambda r: vit(batch=4, r=r), (4, 16, 64, 256)),
    ("ViT-S: batch", lambda batch: vit(batch=batch), (1, 2, 4, 8)),
    ("ViT-S: depth", lambda depth: vit(batch=4, depth=depth), (3, 6, 12)),
    ("ResNet-50: rank", lambda r: resnet(batch=4, r=r), (4, 16, 64, 256)),
    ("ResNet-50: batch", lambda batch: resnet(batch=batch), (1, 2, 4, 8)),
]


def draw(path: Path, rounds: int, device: torch.device) -> None:
    """Measures and draws one panel for each family, without dropout."""
    names = [name for name in installed() if name in ("floor", "full", "ours", "peft")]
    figure, panels = plt.subplots(1, len(FAMILIES), figsize=(4 * len(FAMILIES), 3.5), layout="constrained")
    for panel, (title, make, values) in zip(panels, FAMILIES, strict=True):
        ratios = {value: _ratios(make(value), names, rounds, device) for value in values}
        for name in names[1:]:
            panel.plot(values, [ratios[value].get(name, float("nan")) for value in values], marker="o", label=name)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set(title=title, xscale="log", xticks=values, xticklabels=values, ylabel="time / floor")
        panel.minorticks_off()
        panel.legend()
        print(title, {value: {name: round(r, 2) for name, r in row.items()} for value, row in ratios.items()})
    figure.savefig(path, dpi=110)


def _ratios(case: Case, names: list[str], rounds: int, device: torch.device) -> Mapping[str, float]:
    batch = tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in case.batch())
    models = {name: model for name in names if (model := build(name, case, 0.0, device)) is not None}
    times = seconds(models, batch, rounds)
    return {name: ratio(times, name) for name in models if name != "floor"}
