"""One pass over the user's data, for inits that learn from it, before the model is changed.

Afterwards modes, buffers, gradients, `requires_grad` and random numbers are what they were. Where processes are
connected by `torch.distributed`, each of them has to call `calibrate`, and gets the sum over all.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter.blocks import without_adapters
from lora_plugins.adapter.state import model_state
from lora_plugins.adapter.watches import Step, device_of, input_moments, mean_gradients
from lora_plugins.arguments import with_checked_call
from lora_plugins.errors import ConfigError, PluginError, noted
from lora_plugins.field_checks import MAX_RANK, check_count, optional, shown
from lora_plugins.inplace import base_class_of, own_mode, readable, set_own_mode, submodule
from lora_plugins.plan import Plan
from lora_plugins.plugins import RankRequest, SlotCalibration
from lora_plugins.utils import ending, outside_inference, own_randomness, run_seed


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: with its items by name, with the first of several, or with the batch itself.

    The tensors of the batch are moved to the model's device.
    """
    device = device_of(model)
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

    Raises:
        ConfigError: If one of them is something else.
    """

    batches: Iterable[Any]
    step: Step = call
    limit: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batches, Iterable) and not hasattr(self.batches, "__getitem__"):
            raise ConfigError(f"batches is {shown(self.batches)}. It is a DataLoader, or a list of batches.")
        if not callable(self.step):
            raise ConfigError(f"step is {shown(self.step)}. It is a function of the model and a batch.")
        optional(check_count)("limit", self.limit)


@dataclass(frozen=True)
class Calibration:
    """What one pass over the data has shown about a model.

    Args:
        by_slot: By layer name and slot suffix.
    """

    by_slot: Mapping[tuple[str, str], SlotCalibration] = field(default_factory=dict)

    def of(self, plan: Plan) -> Mapping[tuple[str, str], SlotCalibration]:
        """Returns what was seen at each slot of a plan.

        Raises:
            ConfigError: If a slot was not seen, or not what the plan's init needs.
        """
        found = {}
        for layer, slot, _ in plan.slots():
            seen = self.by_slot.get((layer.name, slot.suffix), SlotCalibration())
            if plan.init.needs is not None and getattr(seen, _FIELDS[plan.init.needs]) is None:
                raise ConfigError(
                    f"The init {plan.init.name!r} needs the {plan.init.needs} of {layer.name!r}, which init_data does "
                    "not have. Calibrate the model with the same configuration."
                )
            found[layer.name, slot.suffix] = seen
        return found


@with_checked_call
@outside_inference
def calibrate(model: nn.Module, plan: Plan, data: InitData) -> Calibration:
    """Reads the data once and returns what the plan's init needs to know about each slot.

    The model is run without its adapters: in eval mode for `inputs`, and for `gradients` in training mode, with the
    normalization layers that the plan freezes in eval mode, as training will see them.

    Args:
        model: The model, which stays as it is.
        plan: What would be adapted, as `LoraModel.plan` returns it.
        data: The data.

    Raises:
        ConfigError: If there are no batches, the step returns no loss where one is needed, or an argument is something
            else.
        TargetError: If a layer was not reached by the data, by name.
        StateError: If an adapter is merged.
    """
    _check_plan(model, plan)
    if not isinstance(data, InitData):
        raise ConfigError(f"calibrate: data is a {type(data).__name__}. {_WRITE_DATA}")
    if plan.init.needs is None:
        return Calibration()
    watch = _WATCHES[plan.init.needs]
    state = model_state(model)
    if state is not None:
        state.check("calibrate")
    batches = islice(data.batches, data.limit) if data.limit is not None else data.batches
    seed = run_seed("data")
    with (
        without_adapters(model) if state is not None else nullcontext(),
        _undisturbed(model),
        readable(model.modules()),
        own_randomness(seed, model, data.batches),
        _without_compilers(),
    ):
        return Calibration(watch(model, plan, batches, data.step))


def calibration_for(
    model: nn.Module, plan: Plan, data: InitData | Calibration | None
) -> Mapping[tuple[str, str], SlotCalibration]:
    """Returns what a plan's init learns about each slot, from data or as a calibration has it; empty for other inits.

    Raises:
        ConfigError: If the init learns from data and there are none; or as `calibrate` and `Calibration.of` do.
    """
    if plan.init.needs is None:
        return {}
    if data is None:
        raise ConfigError(
            f"The init {plan.init.name!r} learns the first A and B from data. Give it some: LoraModel(model, "
            "config, init_data=InitData(loader)). LoraCallback takes them from the training batches by itself, and "
            "a saved adapter needs none: LoraModel.load_adapter(model, path)."
        )
    if not isinstance(data, InitData | Calibration):
        raise ConfigError(f"init_data is a {type(data).__name__}. {_WRITE_DATA}")
    calibration = calibrate(model, plan, data) if isinstance(data, InitData) else data
    return calibration.of(plan)


def allocated(plan: Plan, calibration: Mapping[tuple[str, str], SlotCalibration]) -> Plan:
    """Returns the plan with the ranks that its init derives from the data.

    Raises:
        PluginError: If the init left no layer, or gave ranks to layers that are not there.
    """
    if not calibration:
        return plan
    requests = [
        RankRequest(layer.name, layer.r, [calibration[layer.name, slot.suffix] for slot in layer.slots])
        for layer in plan.layers
    ]
    with noted(f"allocate() of the init {plan.init.name!r}"):
        ranks = plan.init.allocate(requests, plan.init_options)
    names = {layer.name for layer in plan.layers}
    if not isinstance(ranks, Mapping):
        raise PluginError(f"allocate() of the init {plan.init.name!r} returned {ranks!r}, not ranks by layer name.")
    if not ranks.keys() <= names or not all(isinstance(r, Integral) and 0 <= r <= MAX_RANK for r in ranks.values()):
        raise PluginError(
            f"The init {plan.init.name!r} gave ranks that are not whole numbers up to {MAX_RANK}, or to unknown "
            f"layers: {dict(ranks)}."
        )
    given = plan.with_ranks({name: int(r) for name, r in ranks.items()}) if ranks else plan
    if not given.layers:
        raise PluginError(f"The init {plan.init.name!r} gave every layer the rank 0.")
    return given


def _check_plan(model: nn.Module, plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise ConfigError(
            f"calibrate: plan is a {type(plan).__name__}. Give what LoraModel.plan(model, config) returns."
        )
    try:
        for layer in plan.layers:
            submodule(model, layer.name)
    except AttributeError as error:
        raise ConfigError(f"calibrate: plan is of another model. {error}") from error


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back the modes, buffers and `requires_grad` of a model, and the parameters that its layers write."""
    modes = [(module, own_mode(module)) for module in model.modules()]
    written = [
        (tensors, key, tensor, tensor.data)
        for module in model.modules()
        for tensors in (module._buffers, _parameters_that_may_move(module))
        for key, tensor in tensors.items()
        if tensor is not None
    ]
    empty = [
        (module._buffers, key) for module in model.modules() for key, value in module._buffers.items() if value is None
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for module, mode in modes:
            set_own_mode(module, mode)
        for tensors, key, tensor, value in written:
            tensors[key], tensor.data = tensor, value
        for buffers, key in empty:  # such as a cache, or what the first batch of the training is to start
            buffers[key] = None
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    with ending(put_back):
        for tensor, value in {id(tensor): (tensor, value) for _, _, tensor, value in written}.values():
            tensor.data = value.clone()  # what moves is the clone
        yield


def _parameters_that_may_move(module: nn.Module) -> dict[str, Any]:
    """Returns the parameters of a module whose forward may write to them, as one does that clips its weight.

    Of torch's own modules only lookup tables with `max_norm` do. Shards, and what other libraries store in fewer bytes,
    are left out: no copy can take their place.
    """
    owner = next(cls for cls in base_class_of(module).__mro__ if "forward" in vars(cls))
    if owner.__module__.startswith("torch.") and getattr(module, "max_norm", None) is None:
        return {}
    parameters = {key: each for key, each in module._parameters.items() if each is not None}
    return {
        key: each
        for key, each in parameters.items()
        if (each.is_floating_point() or each.is_complex()) and type(each.data) is Tensor
    }


def _without_compilers() -> AbstractContextManager[object]:
    """Runs what is compiled as it is written: what was compiled before the watches' hooks came does not call them."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


_WATCHES = {"inputs": input_moments, "gradients": mean_gradients}
_FIELDS = {"inputs": "inputs", "gradients": "gradient"}
_WRITE_DATA = "Write InitData(batches), with a DataLoader or a list."
