"""Hooks that record, while a model reads data, the inputs of its layers or the gradients of its weights."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from lora_plugins.adapter.content import factor_dtype, slot_matrix
from lora_plugins.errors import ConfigError, TargetError, listing, noted, sentence
from lora_plugins.field_checks import shown
from lora_plugins.inplace import base_class_of, by_position, is_frozen, positional_names, submodule
from lora_plugins.plan import Plan
from lora_plugins.plugins import InputMoments, PlannedLayer, Slot, SlotCalibration
from lora_plugins.utils import in_float64

Step = Callable[[nn.Module, Any], Any]
"""What is done with one batch."""

_CPU = torch.device("cpu")

_INSTEAD = "Add it to exclude_modules, or choose another init."


def device_of(module: nn.Module) -> torch.device:
    """Returns where a module is: the device of its first parameter or, in one that has only buffers, of the first."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), _CPU)


def input_moments(
    model: nn.Module, plan: Plan, batches: Iterable[Any], step: Step
) -> dict[tuple[str, str], SlotCalibration]:
    """Returns the moments of what each slot's matrix is multiplied by; the model is run in eval mode."""
    sums = {
        (layer.name, slot.suffix): _Sums(layer, slot, shape[1], device_of(submodule(model, layer.name)))
        for layer, slot, shape in plan.slots()
    }
    model.eval()
    read = 0
    with ExitStack() as hooks, torch.no_grad():
        for (name, _), total in sums.items():
            # By torch's own method, as in `open_state`: a layer may have another of this name.
            layer = submodule(model, name)
            hooks.enter_context(nn.Module.register_forward_pre_hook(layer, total.add, with_kwargs=True))
        for batch in batches:
            step(model, batch)
            read += 1
    _check_read(torch.tensor(read, device=next(iter(sums.values())).device))
    moments = {key: total.reduced() for key, total in sums.items()}
    unseen = [key[0] for key, (count, _, _) in moments.items() if not count]
    if unseen:
        raise TargetError(
            f"{listing(unseen)} saw no input ({len(unseen)} of {len(moments)}): the data do not pass there, or another "
            f"module reads the weight without calling the layer. The init {plan.init.name!r} cannot start them; add "
            "them to exclude_modules, or choose another init."
        )
    return {
        key: SlotCalibration(inputs=InputMoments(int(count), total.cpu(), gram.cpu()))
        for key, (count, total, gram) in moments.items()
    }


@dataclass
class _Sums:
    """The running moments of one slot's inputs."""

    layer: PlannedLayer
    slot: Slot
    width: int
    device: torch.device
    count: int = 0
    total: Tensor | None = None
    gram: Tensor | None = None

    def add(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = by_position(positional_names(base_class_of(module)), args, kwargs)
        x = self._seen(module, args, kwargs)
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != self.width:
            came = list(x.shape) if isinstance(x, Tensor) else shown(x)
            raise TargetError(
                f"{self.layer.name!r}: its inputs came as {came}, where its weight needs (n, {self.width}). {_INSTEAD}"
            )
        x = in_float64(x.detach())
        total, gram = x.sum(0), x.T @ x
        self.count += len(x)
        self.total = total if self.total is None else self.total + total
        self.gram = gram if self.gram is None else self.gram + gram

    def _seen(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        plugin = self.layer.plugin
        try:
            with noted(f"inputs() of the layer type {plugin.name!r}, for {self.layer.name!r}"):
                return plugin.inputs(module, self.slot, *args, **kwargs)
        except NotImplementedError as error:
            raise TargetError(
                f"{self.layer.name!r}: the plugin {plugin.name!r} does not say what {self.slot.tensor!r} of "
                f"this {base_class_of(module).__name__} is multiplied by. {_INSTEAD}"
            ) from error
        except TypeError as error:  # a subclass may be called with more than its base class
            raise TargetError(
                f"{self.layer.name!r}: the plugin {plugin.name!r} does not understand what this "
                f"{base_class_of(module).__name__} is called with: {sentence(error)} {_INSTEAD}"
            ) from error

    def reduced(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns count, sum and outer products over all processes."""
        nothing = in_float64(torch.zeros(self.width, device=self.device))
        total = nothing if self.total is None else self.total
        gram = torch.outer(nothing, nothing) if self.gram is None else self.gram
        sums = (torch.tensor(self.count, device=total.device), total, gram)
        for tensor in sums:
            _add_up(tensor)
        if not bool(gram.isfinite().all()):
            raise TargetError(f"{self.layer.name!r}: its inputs are not finite.")
        return sums


def mean_gradients(
    model: nn.Module, plan: Plan, batches: Iterable[Any], step: Step
) -> dict[tuple[str, str], SlotCalibration]:
    """Returns the mean gradient of each slot's matrix; the model is run in training mode."""
    weights = {
        (layer.name, slot.tensor): cast(nn.Parameter, submodule(model, layer.name)._parameters[slot.tensor])
        for layer, slot, _ in plan.slots()
    }
    _let_train(model, plan, weights.values())
    sums, counts = _summed_gradients(model, weights, batches, step)
    _check_read(counts)
    for tensor in sums.values():
        _add_up(tensor)
    read, *used = counts.tolist()  # numbers, as the weights may be on several devices
    unused = [key[0] for key, count in zip(weights, used, strict=True) if not count]
    if unused:
        raise TargetError(
            f"{listing(unused)} got no gradient ({len(unused)} of {len(weights)}): the loss does not depend on them. "
            f"The init {plan.init.name!r} cannot start them; add them to exclude_modules, or choose another init."
        )
    wrong = [key[0] for key, total in sums.items() if not bool(total.isfinite().all())]
    if wrong:
        raise TargetError(f"The gradients of {listing(wrong)} are not finite.")
    return {
        (layer.name, slot.suffix): SlotCalibration(
            gradient=slot_matrix(layer, slot, sums[layer.name, slot.tensor] / read).cpu()
        )
        for layer, slot, _ in plan.slots()
    }


def _let_train(model: nn.Module, plan: Plan, weights: Iterable[nn.Parameter]) -> None:
    """Puts a model into training mode as it will be with the plan's adapter, where only these weights get gradients."""
    model.train(True)  # by place, as modules call those below them
    for module in model.modules():
        if is_frozen(module):  # for another adapter, which may freeze other norms than this one will
            module.training = True
    for name in plan.frozen_norms:
        submodule(model, name).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)


def _summed_gradients(
    model: nn.Module, weights: Mapping[tuple[str, str], nn.Parameter], batches: Iterable[Any], step: Step
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Returns the sum of the gradients of each weight; and the number of batches, then of those that reached each."""
    sums = {key: torch.zeros_like(weight, dtype=factor_dtype(weight)) for key, weight in weights.items()}
    read, used = 0, dict.fromkeys(weights, 0)
    for batch in batches:
        with torch.enable_grad():
            loss = _loss(step(model, batch))
        gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
        for key, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                sums[key] += gradient.to_dense()
                used[key] += 1
        read += 1
    return sums, torch.tensor([read, *used.values()], device=next(iter(sums.values())).device)


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


def _check_read(counts: Tensor) -> None:
    """Sums counts over all processes, so that either all or none go on, and checks that something was read."""
    _add_up(counts)
    if not counts.any():
        raise ConfigError("init_data has no batches, so there is nothing to learn the first A and B from.")


def _add_up(tensor: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
