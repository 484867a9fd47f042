"""What is not a training step: injection, loading, merging, inference, a mixed batch."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.speed import merging
from benchmarks.speed.cases import Case, vit
from benchmarks.speed.measure import elapsed
from benchmarks.speed.variants import installed, ours, ours_of_many, peft, peft_of_many
from lora_plugins import LoraConfig, LoraModel

Row = tuple[str, str, str]


def rows(rounds: int, device: torch.device) -> list[Row]:
    """Returns name, ours and PEFT's of each cost; a ratio says what it is a ratio of."""
    return [*_thousand_layers(), *merging.rows(), *_inference(rounds, device), *_mixed_batch(rounds, device)]


def _thousand_layers() -> list[Row]:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(1000)))
    config = LoraConfig(r=4)
    inject = elapsed(lambda: LoraModel(model, config))
    other = copy.deepcopy(LoraModel(model).unload())
    LoraModel(model, config)
    with tempfile.TemporaryDirectory() as folder:
        LoraModel(model).save_adapter(Path(folder) / "adapter")
        load = elapsed(lambda: LoraModel.load_adapter(other, Path(folder) / "adapter"))
    theirs = ["", ""]
    if "peft" in installed():
        theirs = _thousand_layers_of_peft()
    return [("inject into 1,000 layers (s)", f"{inject:.2f}", theirs[0]), ("load 1,000 (s)", f"{load:.2f}", theirs[1])]


def _thousand_layers_of_peft() -> list[str]:
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(1000)))
    other = copy.deepcopy(base)
    config = PeftConfig(r=4, target_modules=[name for name, _ in base.named_children()])
    inject = elapsed(lambda: get_peft_model(base, config))
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(copy.deepcopy(other), config).save_pretrained(folder)
        load = elapsed(lambda: PeftModel.from_pretrained(other, folder))
    return [f"{inject:.2f}", f"{load:.2f}"]


def _inference(rounds: int, device: torch.device) -> list[Row]:
    case = vit()
    models = {"floor": case.model().requires_grad_(False), "ours": ours(case, 0.0)}
    if "peft" in installed():
        models["peft"] = peft(case, 0.0)
    return [("inference, unmerged (ratio to the base)", *_compare(case, models, rounds, device, {}))]


def _mixed_batch(rounds: int, device: torch.device) -> list[Row]:
    case = vit()
    names = ["first", "b", "c", "d"] * 2
    mixed, of_peft = ours_of_many(case, names[:4]), peft_of_many(case, names[:4])
    models = {"floor": case.model().requires_grad_(False), "ours": mixed.model}
    if of_peft is not None:
        models["peft"] = of_peft
    with mixed.mixed_batch(names):
        return [
            (
                "mixed batch of 4 adapters (ratio to the base)",
                *_compare(case, models, rounds, device, {"adapter_names": names}),
            )
        ]


def _compare(
    case: Case,
    models: dict[str, nn.Module],
    rounds: int,
    device: torch.device,
    of_peft: Mapping[str, object],
) -> tuple[str, str]:
    batch = [x.detach().to(device) for x in case.batch()]
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.to(device).eval()
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, model in models.items():
                options = of_peft if name == "peft" else {}
                times[name].append(elapsed(lambda m=model, o=options: m(*batch, **o)))
    ratios = {
        name: median(a / b for a, b in zip(values[1:], times["floor"][1:], strict=True))
        for name, values in times.items()
    }
    return f"{ratios['ours']:.2f}", f"{ratios['peft']:.2f}" if "peft" in ratios else ""
