"""The conformance kit for variants: one call that checks a plugin."""

import copy
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter import adapter_parameters
from lora_plugins.config import LoraConfig
from lora_plugins.inplace import factors, layer_state, own_tensors_of
from lora_plugins.model import LoraModel
from lora_plugins.plugins import VARIANTS, Registry, VariantPlugin
from lora_plugins.testing import check as checks
from lora_plugins.testing.check import Check, by_name, chosen, require, require_close, require_same_state
from lora_plugins.testing.registry_under_test import registry_with
from lora_plugins.utils import own_randomness

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
}
INPUTS = {"linear": (3, 6), "conv2d": (3, 4, 5, 5)}


@dataclass(frozen=True)
class VariantCase:
    """What is checked: a variant on one layer.

    Args:
        variant: The plugin.
        layer: Name of the layer, from `LAYERS`.
    """

    variant: VariantPlugin
    layer: str

    def registry(self) -> Registry:
        """Returns the installed plugins with this variant.

        Raises:
            PluginError: If the plugin could not be registered.
        """
        return registry_with(VARIANTS, self.variant)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """Builds the model, with the same values each time."""
        with own_randomness(0):
            return nn.Sequential(LAYERS[self.layer]()).to(dtype).eval()

    def adapt(self, model: nn.Module, **fields: Any) -> LoraModel:
        """Puts an adapter of the variant on the model."""
        config = LoraConfig(**{"r": 2, "alpha": 3.0, "variant": self.variant.name, **fields})
        return LoraModel(model, config, registry=self.registry())

    def trained(self, dtype: torch.dtype = torch.float64) -> LoraModel:
        """An adapted model whose tensors are no longer what they were at the start."""
        lora = self.adapt(self.model(dtype), init="none")
        with torch.no_grad():
            for parameter in adapter_parameters(lora.model[0], "default"):  # type: ignore[index]
                parameter.mul_(1.25).add_(0.03)
        return lora

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns the output for one batch."""
        with own_randomness(1):
            x = torch.randn(INPUTS[self.layer], dtype=torch.float64).to(dtype)
        return torch.as_tensor(model(x))


def _registration(case: VariantCase) -> None:
    case.registry()


def _shapes(case: VariantCase) -> None:
    lora = case.adapt(case.model())
    layer = lora.plans["default"].layers[0]
    (slot,) = layer.slots
    module = lora.model.get_submodule(layer.name)
    own, shapes = own_tensors_of(module, "default", slot), layer.own_shapes(slot)
    names = [name for name in own if not name.isidentifier() or name in ("A", "B")]
    require(not names, f"tensors are called {names}")
    for name, tensor in own.items():
        require(tensor.shape == torch.Size(shapes[name]), f"{name!r} is {tuple(tensor.shape)}, not {shapes[name]}")
        require(bool(tensor.isfinite().all()), f"{name!r} has values that are not finite")
    total = sum(p.numel() for p in lora.model.parameters() if p.requires_grad)
    require(lora.plans["default"].trainable == total, f"the plan counts {lora.plans['default'].trainable} of {total}")


def _identity(case: VariantCase) -> None:
    model = case.model()
    before = case.run(model)
    case.adapt(model)
    require_close("the output at the start", case.run(model), before)


def _gradients(case: VariantCase) -> None:
    lora = case.trained()
    (slot,) = lora.plans["default"].layers[0].slots
    layer = lora.model.get_submodule(lora.plans["default"].layers[0].name)
    case.run(lora.model).sin().sum().backward()  # type: ignore[no-untyped-call]
    tensors = dict(zip("AB", factors(layer, "default", slot), strict=True))
    for name, tensor in {**tensors, **own_tensors_of(layer, "default", slot)}.items():
        moved = tensor.grad is not None and bool(tensor.grad.abs().max() > 0)
        require(moved, f"{name!r} gets no gradient")


def _base_untouched(case: VariantCase) -> None:
    model = case.model()
    weight = model[0]._parameters["weight"]
    assert weight is not None
    before = weight.detach().clone()
    case.adapt(model, init="none")
    case.run(model).sum().backward()  # type: ignore[no-untyped-call]
    require_close("the base weight after a step", weight, before, 0)


def _merging(case: VariantCase) -> None:
    lora = case.trained()
    plain = {key: value.clone() for key, value in lora.model.state_dict().items() if "lora_" not in key}
    output = case.run(lora.model)
    lora.merge_adapter()
    require_close("the merged output", case.run(lora.model), output)
    lora.unmerge_adapter()
    require_close("the unmerged output", case.run(lora.model), output, 0)
    lora.unload()
    require_same_state("the unloaded model", lora.model.state_dict(), plain)


def _copies(case: VariantCase) -> None:
    lora = case.trained()
    twin = copy.deepcopy(lora.model)
    require_close("the output of a deep copy", case.run(twin), case.run(lora.model), 0)
    state = layer_state(twin[0])  # type: ignore[index]
    require(state.adapters["default"].variant is not None, "the copy has lost its variant")


def _files(case: VariantCase) -> None:
    elsewhere = replace(case, variant=copy.deepcopy(case.variant))  # another process has another plugin object
    lora, fresh = case.trained(), case.model()
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(Path(folder))
        LoraModel.load_adapter(fresh, Path(folder), registry=elsewhere.registry())
    require_same_state("the loaded model", fresh.state_dict(), lora.model.state_dict())
    require_close("the output of the loaded model", case.run(fresh), case.run(lora.model), 0)


def _dtype(case: VariantCase) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        lora = case.trained(dtype)
        output = case.run(lora.model, dtype)
        require(output.dtype == dtype, f"the output is of {output.dtype} on a base of {dtype}")
        wrong = {k: v.dtype for k, v in lora.model.state_dict().items() if "lora_" in k and v.dtype != torch.float32}
        require(not wrong, f"on a base of {dtype}, {wrong}")


_CHECKS: tuple[Check[VariantCase], ...] = (
    Check(
        "registration", _registration, "the registrar takes the plugin", "name is missing, or an attribute is wrong."
    ),
    Check(
        "shapes",
        _shapes,
        "first_values gives the tensors that shapes announces, with names that can follow lora_, finite",
        "shapes counts inputs where outputs are meant, or returns another set of names than first_values.",
    ),
    Check(
        "identity",
        _identity,
        "the adapted model starts as the untouched one, since B starts at zero",
        "first_values does not belong to the weight it is handed: the init may have changed it.",
    ),
    Check(
        "gradients",
        _gradients,
        "A, B and the variant's own tensors get gradients",
        "delta_weight works on detached or converted copies, as with .item(), .data or torch.no_grad().",
    ),
    Check(
        "base",
        _base_untouched,
        "delta_weight leaves the weight that it is handed alone",
        "an operation in place, such as weight.add_(...): the weight is the model's own.",
    ),
    Check(
        "merging",
        _merging,
        "merged, the plain layer computes the same; unmerged and unloaded, all bits are what they were",
        "delta_weight returns the new weight instead of by what it changes.",
    ),
    Check(
        "copies",
        _copies,
        "a deep copy of the model computes the same",
        "state is kept on the plugin and not in tensors.",
    ),
    Check(
        "files",
        _files,
        "an adapter that is saved and loaded computes the same bits",
        "delta_weight uses something that is neither a tensor of the adapter nor the weight.",
    ),
    Check(
        "dtype",
        _dtype,
        "A, B and own tensors are float32 on a base in half precision, whose type the output keeps",
        "a constant of a fixed type or device, as torch.ones(n) where A.new_ones(n) is meant.",
    ),
)

VARIANT_CHECKS: dict[str, Check[VariantCase]] = by_name(_CHECKS)
"""All checks of a variant by name, in the order they are run."""


def check_variant_plugin(
    variant: VariantPlugin, *, only: Collection[str] | None = None, skip: Collection[str] = ()
) -> None:
    """Checks a variant on a linear layer and a grouped convolution; it need not be registered or installed.

    Args:
        variant: The plugin.
        only: Names of the checks to run; all of `VARIANT_CHECKS` by default.
        skip: Names of checks not to run.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check of a name.

    Example:
        >>> from lora_plugins.variants.dora import DoraVariant
        >>> check_variant_plugin(DoraVariant())
    """
    selected = chosen(VARIANT_CHECKS, only, skip)
    for layer in LAYERS:
        case = VariantCase(variant, layer)
        for check in selected:
            checks.run(check, case, f"{type(variant).__name__} on {layer}")
