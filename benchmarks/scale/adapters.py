"""Many adapters on one ViT-S: memory, switching, and a batch whose rows have different ones."""

from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from benchmarks.speed.cases import vit
from benchmarks.speed.measure import elapsed
from benchmarks.speed.variants import ours_of_many, peft_of_many
from lora_plugins import LoraModel

COUNT, ROWS = 100, 32
Row = tuple[str, str, str]


def rows(rounds: int) -> list[Row]:
    """Returns what was measured, ours and PEFT's."""
    case = vit(batch=ROWS, r=8)
    x = case.batch()[0].detach()
    names = [f"a{at}" for at in range(COUNT)]
    ours, peft = ours_of_many(case, names), peft_of_many(case, names)
    return [*_memory_and_switching(ours, peft, rounds), *_mixed(ours, peft, x, rounds)]


def _memory_and_switching(ours: LoraModel, peft: nn.Module | None, rounds: int) -> list[Row]:
    model = ours.model
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name) / COUNT
    base = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    names = [f"a{at % COUNT}" for at in range(1, rounds + 1)]
    own = median(elapsed(lambda name=name: ours.set_adapter(name, trainable=False)) for name in names)
    theirs = median(elapsed(lambda name=name: peft.set_adapter(name)) for name in names) if peft is not None else None
    return [
        ("base (MiB)", f"{base / 2**20:.1f}", ""),
        (f"each of {COUNT} adapters (MiB)", f"{adapters / 2**20:.2f}", ""),
        (f"switch among {COUNT} (ms)", f"{1000 * own:.1f}", "" if theirs is None else f"{1000 * theirs:.1f}"),
    ]


@torch.inference_mode()
def _mixed(ours: LoraModel, peft: nn.Module | None, x: torch.Tensor, rounds: int) -> list[Row]:
    names = [f"a{at}" for at in range(ROWS)]
    model = ours.model

    def mixed() -> torch.Tensor:
        with ours.mixed_batch(names):
            return model(x)

    def one_by_one() -> torch.Tensor:
        found = []
        for at, name in enumerate(names):
            ours.set_adapter(name, trainable=False)
            found.append(model(x[at : at + 1]))
        return torch.cat(found)

    def base() -> torch.Tensor:
        with ours.disable_adapter():
            return model(x)

    actions: dict[str, Callable[[], torch.Tensor]] = {"base": base, "mixed": mixed, "one by one": one_by_one}
    if peft is not None:
        actions["peft"] = lambda: peft(x, adapter_names=names)
    times: dict[str, list[float]] = {name: [] for name in actions}
    torch.testing.assert_close(mixed(), one_by_one(), rtol=1e-3, atol=1e-3)
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(elapsed(action))
    over = {name: median(a / b for a, b in zip(of, times["base"], strict=True)) for name, of in times.items()}
    theirs = f"{over['peft']:.2f}" if peft is not None else ""
    return [
        (f"{ROWS} rows, one batch of the base (ms)", f"{1000 * median(times['base']):.0f}", ""),
        (f"{ROWS} rows with {ROWS} adapters, mixed, over it", f"{over['mixed']:.2f}", theirs),
        ("the same, one by one, over it", f"{over['one by one']:.2f}", ""),
    ]
