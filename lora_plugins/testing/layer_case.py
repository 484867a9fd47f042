"""A layer plugin with one choice of its layer's options: what the checks build, adapt and run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.config import LoraConfig
from lora_plugins.inplace import base_class_of, detached_weight, factors, layer_state, own_tensors_of, slot_tensors
from lora_plugins.model import LoraModel
from lora_plugins.plugins import LAYERS, LayerPlugin, Registry, Slot, class_path, computes_as
from lora_plugins.testing.registry_under_test import registry_with
from lora_plugins.testing.required import CPU, TIGHT, move_values, require, require_all_close
from lora_plugins.utils import own_randomness

VARIANT = "dora"
"""The variant that layer types are checked with: its update is no product of two factors."""


class Holder(nn.Module):
    """A model of one layer, whose name there is `layer`. It takes the leaves of the layer's inputs, one after another.

    Args:
        layer: The layer.
        form: What the leaves are to be filled into: the inputs by position, and those by name. None where each leaf is
            an input by position.
    """

    def __init__(self, layer: nn.Module, form: tuple[Any, Any] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.form = form

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Calls the layer."""
        args, by_name = self.given(inputs)
        return self.layer(*args, **by_name, **named)

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Returns inputs as the layer takes them, by position and by name."""
        return (inputs, {}) if self.form is None else _filled(self.form, iter(inputs))


@dataclass(frozen=True)
class LayerCase:
    """What is checked.

    Args:
        plugin: The plugin.
        build: Makes a layer, called with `options` as keywords.
        inputs: Makes what the layer is called with, given the layer: one input, or several in a tuple; by name for a
            layer that takes some by keyword alone.
        options: The layer's options.
        backend: The backend of torch.compile; None leaves compiling out.
        device: Where layer and inputs are; their values are drawn on the CPU, the same for every device.
    """

    plugin: LayerPlugin[Any]
    build: Callable[..., nn.Module]
    inputs: Callable[[Any], Any]
    options: Mapping[str, Any]
    backend: str | None = "eager"
    device: torch.device = CPU

    def registry(self) -> Registry:
        """Returns a registry of this plugin and the built-in inits; the plugin may be installed as well.

        Raises:
            PluginError: If the plugin could not be registered.
        """
        return registry_with(LAYERS, self.plugin)

    def model(self, dtype: torch.dtype = torch.float64) -> Holder:
        """Builds a model of one layer, all of which is trained, with the same values each time."""
        with own_randomness(0):
            layer = self.build(**self.options)
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        model = Holder(layer, self.form(layer))
        # Not to(dtype), which would take the imaginary part of complex ones.
        model._apply(lambda tensor: _placed(tensor, dtype, self.device))  # type: ignore[no-untyped-call]
        return model

    def form(self, layer: nn.Module) -> tuple[Any, Any] | None:
        """Returns what the leaves of a layer's inputs are to be filled into, as `Holder` takes it."""
        args, named = self._made(layer, seed=0)
        flat = not named and not any(type(x) in (list, tuple, dict) for x in args)
        return None if flat else _filled((args, named), repeat(None))

    def arguments(self, layer: nn.Module, seed: int = 0) -> tuple[Any, ...]:
        """Makes inputs in the type of a layer, the same for the same seed: what a `Holder` is called with.

        Those in tuples, lists and dictionaries, such as the state of an LSTM, are one after another.
        """
        dtype = next(parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())
        return tuple(_placed(x, dtype, self.device) for x in _leaves(self._made(layer, seed)))

    def _made(self, layer: nn.Module, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the inputs by position, and those by name, of a layer whose forward has some by keyword alone."""
        parameters = [*signature(base_class_of(layer).forward).parameters.values()][1:]
        keywords = [parameter for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY]
        with own_randomness(seed):
            made = self.inputs(layer)
        if keywords and isinstance(made, Mapping) and made.keys() <= {parameter.name for parameter in parameters}:
            return (), dict(made)
        needed = [keyword.name for keyword in keywords if keyword.default is Parameter.empty]
        require(
            not needed and (not keywords or len(keywords) < len(parameters)),
            f"the layer takes {', '.join(needed) or 'all'} by keyword alone, and its inputs have no names; give them "
            "all in a dictionary",
        )
        return (tuple(made) if isinstance(made, list | tuple) else (made,)), {}

    def adapt(self, model: nn.Module, target: str = "layer", **fields: Any) -> LoraModel:
        """Adapts a layer of a model, so that it starts different from the untouched one."""
        config = LoraConfig(**{"r": 3, "alpha": 5.0, "init": "none", "target_modules": target, **fields})
        return LoraModel(model, config, registry=self.registry())

    def adapted(self, dtype: torch.dtype = torch.float64, **fields: Any) -> Holder:
        """Builds a model and adapts it."""
        model = self.model(dtype)
        self.adapt(model, **fields)
        return model

    def slots(self) -> Sequence[Slot]:
        """Returns the slots of a whole-layer adapter."""
        return tuple(self.plugin.slots(self.model().layer))

    @property
    def has_branch(self) -> bool:
        """Whether the plugin has a branch for the class of the layer."""
        known = {class_path(cls) for cls in self.plugin.branch_types}
        return self.plugin.branch_use != "never" and not known.isdisjoint(
            computes_as(base_class_of(self.model().layer))
        )

    @property
    def can_mix(self) -> bool:
        """Whether rows of a batch of the layer can have adapters of their own."""
        mixes = type(self.plugin).mixed is not LayerPlugin.mixed
        return mixes and self.has_branch and not self.plugin.mixing_problem(self.model().layer)

    def selections(self) -> list[dict[str, list[str]]]:
        """Returns the values of `fused_parts` to check: the whole layer, and each of its parts alone."""
        return [{}, *({"layer": [part]} for part in self.plugin.parts(self.model().layer))]


def _leaves(x: Any) -> Iterator[Any]:
    """Yields what tuples, lists and dictionaries hold, of any depth."""
    if type(x) in (list, tuple, dict):
        for each in x.values() if type(x) is dict else x:
            yield from _leaves(each)
    else:
        yield x


def _filled(form: Any, leaves: Iterator[Any]) -> Any:
    """Returns tuples, lists and dictionaries of the same form that hold other leaves."""
    if type(form) in (list, tuple):
        return type(form)(_filled(each, leaves) for each in form)
    if type(form) is dict:
        return {name: _filled(each, leaves) for name, each in form.items()}
    return next(leaves)


def _placed(x: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Moves a tensor to a device and, if it is floating, to a type; other inputs stay as they are."""
    return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x


def call(module: nn.Module, inputs: Sequence[Any], seed: int = 1, **named: Any) -> Any:
    """Calls a module, with the same random numbers each time, for layers that draw some themselves.

    It gets copies of the inputs, for layers that write to theirs.
    """
    given = copies((*inputs, *named.values()))
    with own_randomness(seed, module):
        return module(*given[: len(inputs)], **dict(zip(named, given[len(inputs) :], strict=True)))


def copies(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Copies inputs, with their strides; those whose rows are one in memory stay, as nobody can write to them."""
    return mapped(inputs, lambda x: x if 0 in x.stride() else x.clone())


def runs(module: nn.Module, inputs: Sequence[Any], **named: Any) -> bool:
    """Whether an untouched layer can run at all in this type, on this device or on such inputs."""
    try:
        call(module, inputs, **named)
    except Exception:  # torch and the layer's author have no class for all that can go wrong here
        return False
    return True


def config_like(lora: LoraModel, **fields: Any) -> LoraConfig:
    """Returns the configuration of the adapter `default` with other fields."""
    return LoraConfig(**{**lora.adapters["default"].to_dict(), **fields})


def add_second(lora: LoraModel, **fields: Any) -> None:
    """Adds an adapter `second` like `default`, of another rank and scaling, and activates both."""
    lora.add_adapter("second", config_like(lora, r=2, alpha=1.0, **fields))
    lora.set_adapter(["default", "second"])


def moved(model: Holder) -> Holder:
    """Moves all tensors of the adapters, a variant's own too, as training would."""
    move_values(adapter_leaves(model.layer))
    return model


def mapped(inputs: Sequence[Any], function: Callable[[Tensor], Tensor], which: Iterable[Any] = ()) -> tuple[Any, ...]:
    """Applies a function to the dense tensors, or `which` of the inputs; once to one that stands there twice."""
    chosen = list(which) or [is_dense(x) for x in inputs]
    results = {id(x): function(x) for x, each in zip(inputs, chosen, strict=True) if each}
    return tuple(results.get(id(x), x) for x in inputs)


def batched(inputs: Sequence[Any]) -> list[bool]:
    """Whether each of the inputs has the batch as its first dimension: all dense tensors as long as the first."""
    first = inputs[0]
    if not is_dense(first) or not first.dim():
        return [False for _ in inputs]
    return [is_dense(x) and x.dim() > 0 and len(x) == len(first) for x in inputs]


def is_dense(x: Any) -> bool:
    """Whether an input is a tensor that can be cut and written to: a sparse one cannot, nor rows of several lengths."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def is_values(x: Any) -> bool:
    """Whether an input is a dense tensor of floating numbers."""
    return is_dense(x) and x.is_floating_point()


def updated(plugin: LayerPlugin[Any], layer: nn.Module, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns what the law says of the weights of an adapted layer, `W + ΔW` by attribute name, from A and B.

    The adapters that act are in `weights`, each with what its update is multiplied by.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        adapter = layer_state(layer).adapters[name]
        for slot in adapter.slots:
            A, B = factors(layer, name, slot)
            base = found.get(slot.tensor, detached_weight(layer, slot.tensor).to(A.dtype))
            matrix = weight * adapter.scaling * (B @ A)
            if adapter.variant is not None:
                part = plugin.to_matrix(detached_weight(layer, slot.tensor)).to(A.dtype)
                part = part if slot.rows is None else part[slot.rows[0] : slot.rows[1]]
                own = own_tensors_of(layer, name, slot)
                matrix = weight * adapter.variant.delta_weight(part.clone(), A, B, adapter.scaling, own)
            if slot.rows is not None:
                start, stop, total = slot.rows
                matrix = torch.cat([matrix.new_zeros(start, matrix.shape[1]), matrix])
                matrix = torch.cat([matrix, matrix.new_zeros(total - stop, matrix.shape[1])])
            found[slot.tensor] = base + plugin.from_matrix(matrix, base.shape)
    return {name: value.to(detached_weight(layer, name).dtype) for name, value in found.items()}  # rounded once


def lawful(case: LayerCase, model: Holder, weights: Mapping[str, float] | None = None) -> Holder:
    """Builds the untouched model again with the updated weights of an adapted one, and all else that it has now.

    The adapters that act are told as in `updated`: `default` if they are not given, and none if empty.
    """
    layer = model.layer
    dtype = next(p.dtype for p in layer.parameters() if p.is_floating_point())
    reference = case.model(dtype)
    reference.load_state_dict(model.state_dict(), strict=False)
    modules = dict(model.named_modules())
    for name, module in reference.named_modules():  # of which an adapter may have frozen a norm in the layer
        module.training = modules[name].training
    for name, value in updated(case.plugin, layer, {"default": 1.0} if weights is None else weights).items():
        delattr(reference.layer, name)
        setattr(reference.layer, name, _WithDenseGradient.apply(value))  # type: ignore[no-untyped-call]
    return reference


def require_lawful(
    what: str,
    case: LayerCase,
    model: Holder,
    inputs: Sequence[Any],
    tolerance: float = TIGHT,
    run: Callable[..., Any] = call,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Raises a `MismatchError` unless an adapted layer computes what the law says; `weights` are as in `lawful`."""
    reference = lawful(case, model, weights)  # before a call that moves what the layer itself counts or follows
    require_all_close(what, run(model, inputs), call(reference, inputs), tolerance)


def require_sum(case: LayerCase, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises a `MismatchError` unless the updates of two adapters, with these fields, add up."""
    model = case.model()
    add_second(case.adapt(model, **first), **second)
    inputs, both = case.arguments(model.layer), {"default": 1.0, "second": 1.0}
    require_lawful(f"the output with {first} and {second}", case, moved(model), inputs, weights=both)


class _WithDenseGradient(torch.autograd.Function):
    """Hands a gradient on as a dense one: an untouched layer may give a sparse one, which only a leaf can take."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient.to_dense() if gradient.is_sparse else gradient


def adapter_leaves(layer: nn.Module) -> list[nn.Parameter]:
    """Returns A and B of every slot of every adapter of a layer, and what variants have besides."""
    return [*named_leaves(layer).values()]


def named_leaves(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the tensors of every slot of every adapter of a layer, by their names in its state dict."""
    return {
        f"lora_{factor}{slot.suffix}.{name}": tensor
        for name, adapter in layer_state(layer).adapters.items()
        for slot in adapter.slots
        for factor, tensor in slot_tensors(layer, name, slot).items()
    }
