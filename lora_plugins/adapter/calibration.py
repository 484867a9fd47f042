"""One pass over the user's data, for inits that learn from it, before anything of the model is changed.

The model is disturbed in nothing: modes, buffers, gradients, `requires_grad` and random numbers are afterwards what
they were before. Where processes are connected by `torch.distributed`, every one of them has to call `observe`, and
each gets the sum over all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from lora_plugins.adapter.attach import factor_dtype, run_seed, slot_matrix, slots
from lora_plugins.adapter.state import model_state, without_adapters
from lora_plugins.errors import ConfigError, PluginError, TargetError, listing
from lora_plugins.inplace.frozen_norm import FrozenNorm
from lora_plugins.plan.plan import Plan, PlannedLayer
from lora_plugins.plugins.init import InputMoments, Observed, RankRequest
from lora_plugins.plugins.layer import Slot
from lora_plugins.utils.randomness import own_randomness


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: with its items by name, with the first of several, or with the batch itself.

    Args:
        model: The model.
        batch: Its tensors are moved to the model's device.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{key: _moved(value, device) for key, value in batch.items()})
    return model(_moved(batch[0] if isinstance(batch, list | tuple) else batch, device))


@dataclass(frozen=True)
class InitData:
    """What an init learns from.

    Args:
        batches: A DataLoader, or anything else that yields batches. It is read once.
        step: What is done with one batch: called with the model and the batch, it runs the model. For an init that
            needs gradients it returns the loss, or something with a `loss`. By default the model is called with the
            items of the batch by name, with the first of several, or with the batch itself.
        limit: The number of batches to read; all of them by default.
    """

    batches: Iterable[Any]
    step: Callable[[nn.Module, Any], Any] = call
    limit: int | None = None


@dataclass(frozen=True)
class Observations:
    """What one pass over data showed of a model.

    Args:
        by_slot: By layer name and slot suffix.
    """

    by_slot: Mapping[tuple[str, str], Observed] = field(default_factory=dict)

    def of(self, plan: Plan) -> Mapping[tuple[str, str], Observed]:
        """Returns what was observed of each slot of a plan.

        Raises:
            ConfigError: If a slot was not observed, or not what the plan's init needs.
        """
        found = {}
        for layer, slot, _ in slots(plan):
            observed = self.by_slot.get((layer.name, slot.suffix), Observed())
            if plan.init.needs is not None and getattr(observed, _FIELDS[plan.init.needs]) is None:
                raise ConfigError(
                    f"The init {plan.init.name!r} needs the {plan.init.needs} of {layer.name!r}, which init_data does "
                    "not have. Observe the model with the same configuration."
                )
            found[layer.name, slot.suffix] = observed
        return found


def observe(model: nn.Module, plan: Plan, data: InitData) -> Observations:
    """Reads the data once and returns what the plan's init needs to know of each slot.

    The model is run without its adapters: in eval mode for `inputs`, and for `gradients` in training mode, with the
    normalization layers that the plan freezes in eval mode, as training will see them.

    Args:
        model: The model; it is touched in nothing.
        plan: What would be adapted, as `LoraModel.plan` returns it.
        data: The data.

    Raises:
        ConfigError: If there are no batches, or the step returns no loss where one is needed.
        TargetError: If a layer was not reached by the data, by name.
        StateError: If an adapter is merged.
    """
    if plan.init.needs is None:
        return Observations()
    watch = _WATCHES[plan.init.needs]
    state = model_state(model)
    if state is not None:
        state.refuse_merged("Observing the model")
    batches = islice(data.batches, data.limit) if data.limit is not None else data.batches
    seed = run_seed("data")
    with (
        without_adapters(model, state) if state is not None else nullcontext(),
        _undisturbed(model),
        own_randomness(seed, model, data.batches),
    ):
        return Observations(watch(model, plan, batches, data.step))


def allocated(plan: Plan, observed: Mapping[tuple[str, str], Observed]) -> Plan:
    """Returns the plan with the ranks that its init gives from what was observed.

    Raises:
        PluginError: If the init left no layer, or gave ranks to layers that are not there.
    """
    if not observed:
        return plan
    requests = [
        RankRequest(layer.name, layer.r, [observed[layer.name, slot.suffix] for slot in layer.slots])
        for layer in plan.layers
    ]
    ranks = plan.init.allocate(requests, plan.init_options)
    names = {layer.name for layer in plan.layers}
    if not ranks.keys() <= names or any(not isinstance(r, int) or r < 0 for r in ranks.values()):
        raise PluginError(f"The init {plan.init.name!r} gave ranks that are none, or to unknown layers: {dict(ranks)}.")
    given = plan.with_ranks(ranks) if ranks else plan
    if not given.layers:
        raise PluginError(f"The init {plan.init.name!r} gave every layer the rank 0.")
    return given


def _inputs(
    model: nn.Module, plan: Plan, batches: Iterable[Any], step: Callable[[nn.Module, Any], Any]
) -> dict[tuple[str, str], Observed]:
    sums = {(layer.name, slot.suffix): _Sums(layer, slot, shape[1]) for layer, slot, shape in slots(plan)}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(total.add, with_kwargs=True)
        for (name, _), total in sums.items()
    ]
    model.eval()
    read = 0
    try:
        with torch.no_grad():
            for batch in batches:
                step(model, batch)
                read += 1
    finally:
        for hook in hooks:
            hook.remove()
    _refuse_empty(read)
    moments = {key: total.reduced() for key, total in sums.items()}
    unseen = [key[0] for key, (count, _, _) in moments.items() if not count]
    if unseen:
        raise TargetError(
            f"{listing(unseen)} saw no input ({len(unseen)} of {len(moments)}): the data do not pass there, or another "
            f"module reads the weight without calling the layer. The init {plan.init.name!r} cannot start them; add "
            "them to exclude_modules, or choose another init."
        )
    return {
        key: Observed(inputs=InputMoments(int(count), total.cpu(), gram.cpu()))
        for key, (count, total, gram) in moments.items()
    }


@dataclass
class _Sums:
    """The running moments of one slot's inputs."""

    layer: PlannedLayer
    slot: Slot
    width: int
    count: int = 0
    total: Tensor | None = None
    gram: Tensor | None = None

    def add(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = self.layer.plugin.inputs(module, self.slot, *args, **kwargs).detach()
        if x.dim() != 2 or x.shape[1] != self.width:
            raise TargetError(
                f"{self.layer.name!r}: its inputs came as {list(x.shape)}, where its weight needs (n, {self.width}). "
                "Add it to exclude_modules, or choose another init."
            )
        x = x.double()
        total, gram = x.sum(0), x.T @ x
        self.count += len(x)
        self.total = total if self.total is None else self.total + total
        self.gram = gram if self.gram is None else self.gram + gram

    def reduced(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns count, sum and outer products over all processes."""
        total = torch.zeros(self.width, dtype=torch.float64) if self.total is None else self.total
        gram = torch.zeros(self.width, self.width, dtype=torch.float64) if self.gram is None else self.gram
        sums = (torch.tensor(self.count, device=total.device), total, gram)
        for tensor in sums:
            _add_up(tensor)
        if not bool(gram.isfinite().all()):
            raise TargetError(f"{self.layer.name!r}: its inputs are not finite.")
        return sums


def _gradients(
    model: nn.Module, plan: Plan, batches: Iterable[Any], step: Callable[[nn.Module, Any], Any]
) -> dict[tuple[str, str], Observed]:
    weights = {
        (layer.name, slot.tensor): cast(nn.Parameter, model.get_submodule(layer.name)._parameters[slot.tensor])
        for layer, slot, _ in slots(plan)
    }
    sums = {key: torch.zeros_like(weight, dtype=factor_dtype(weight)) for key, weight in weights.items()}
    used = dict.fromkeys(weights, 0)
    model.train()
    for module in model.modules():
        if isinstance(module, FrozenNorm):  # for another adapter, which may hold other layers still than this one will
            module.training = True
    for name in plan.frozen_norms:
        model.get_submodule(name).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    read = 0
    for batch in batches:
        with torch.enable_grad():
            loss = _loss(step(model, batch))
        for key, gradient in zip(
            weights, torch.autograd.grad(loss, [*weights.values()], allow_unused=True), strict=True
        ):
            if gradient is not None:
                sums[key] += gradient.to_dense()
                used[key] += 1
        read += 1
    _refuse_empty(read)
    device = next(iter(sums.values())).device
    counts = torch.tensor([read, *used.values()], device=device)
    for tensor in (counts, *sums.values()):
        _add_up(tensor)
    unused = [key[0] for key, count in zip(weights, counts[1:].tolist(), strict=True) if not count]
    if unused:
        raise TargetError(
            f"{listing(unused)} got no gradient ({len(unused)} of {len(weights)}): the loss does not depend on them. "
            f"The init {plan.init.name!r} cannot start them; add them to exclude_modules, or choose another init."
        )
    wrong = [key[0] for key, total in sums.items() if not bool(total.isfinite().all())]
    if wrong:
        raise TargetError(f"The gradients of {listing(wrong)} are not finite.")
    return {
        (layer.name, slot.suffix): Observed(
            gradient=slot_matrix(layer, slot, sums[layer.name, slot.tensor] / counts[0]).cpu()
        )
        for layer, slot, _ in slots(plan)
    }


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(
            f"The init needs gradients, and init_data's step returned {what} instead of the loss. Pass a step that "
            "returns it: InitData(loader, step=lambda model, batch: loss_of(model(batch[0]), batch[1]))."
        )
    if not loss.requires_grad:
        raise ConfigError("The loss that init_data's step returned has no gradient: the step detached it.")
    return loss.sum()


def _refuse_empty(read: int) -> None:
    if not read:
        raise ConfigError("init_data has no batches, so there is nothing to learn the first A and B from.")


def _add_up(tensor: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gives the modes, buffers and `requires_grad` of a model back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, key, buffer, value in buffers:
                module._buffers[key] = buffer.copy_(value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


_WATCHES = {"inputs": _inputs, "gradients": _gradients}
_FIELDS = {"inputs": "inputs", "gradients": "gradient"}
