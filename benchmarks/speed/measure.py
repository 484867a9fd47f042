"""Time and memory of steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.speed.precision import Precision

FULL_PRECISION = Precision()


def step(
    model: nn.Module, batch: tuple[Tensor, ...], leaves: Sequence[Tensor], precision: Precision = FULL_PRECISION
) -> None:
    """Forward, loss and backward.

    `leaves` are all that may have a gradient, which is dropped first; an optimizer has them in a list as well.
    """
    for tensor in leaves:
        tensor.grad = None
    device = batch[0].device
    with precision.context(device):
        loss = model(*batch).float().square().mean()
    if loss.requires_grad:  # the floor of an embedding has nothing to differentiate
        precision.scaler(device).scale(loss).backward()


def elapsed(action: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def seconds(
    models: Mapping[str, nn.Module], batch: tuple[Tensor, ...], rounds: int, precision: Precision = FULL_PRECISION
) -> dict[str, list[float]]:
    """Times one step of each model in turn, after two rounds of warming up; each round begins with another one."""
    times: dict[str, list[float]] = {name: [] for name in models}
    leaves = {name: [*model.parameters(), *batch] for name, model in models.items()}
    names = list(models)
    for round_ in range(rounds + 2):
        first = round_ % len(names)  # a step finds the memory as the step before it left it
        for name in names[first:] + names[:first]:
            _wait(batch)
            start = time.perf_counter()
            step(models[name], batch, leaves[name], precision)
            _wait(batch)
            if round_ > 1:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], name: str, base: str = "floor") -> list[float]:
    """One variant's time over another's, in each round."""
    return [a / b for a, b in zip(times[name], times[base], strict=True)]


def ratio(times: Mapping[str, list[float]], name: str, base: str = "floor") -> float:
    """The median over rounds of one variant's time over another's."""
    return median(ratios(times, name, base))


def kept_bytes(model: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """Counts what the forward keeps for the backward: each storage once, parameters and the batch left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *batch)}
    return sum(storage.nbytes() for address, storage in _kept(model, batch).items() if address not in known)


def input_bytes(model: nn.Module, names: list[str], batch: tuple[Tensor, ...]) -> int:
    """Counts the inputs of some layers, each storage once, those left out that the frozen model keeps anyway."""
    seen: dict[int, torch.UntypedStorage] = {}

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        storage = inputs[0].untyped_storage()
        seen[storage.data_ptr()] = storage

    hooks = [model.get_submodule(name).register_forward_pre_hook(note) for name in names]
    kept = _kept(model, batch)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for address, storage in seen.items() if address not in kept)


def _kept(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[int, torch.UntypedStorage]:
    """Returns what the forward keeps for the backward, by address; alive, so that no address is used twice."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()  # an output that is kept by its own node would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*batch).square().mean()
    return kept


def _wait(batch: tuple[Tensor, ...]) -> None:
    if batch[0].is_cuda:
        torch.cuda.synchronize()
