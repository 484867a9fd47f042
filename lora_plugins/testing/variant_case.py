"""What the kit for variants checks: a variant on one layer, with a model, a batch and the output that is expected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter import adapter_parameters
from lora_plugins.config import LoraConfig
from lora_plugins.inplace import detached_weight, terms_of
from lora_plugins.model import LoraModel
from lora_plugins.plugins import VARIANTS, Registry, Term, VariantPlugin, default_registry
from lora_plugins.testing.registry_under_test import registry_with
from lora_plugins.testing.required import CPU, move_values
from lora_plugins.utils import own_randomness

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "two parts of a linear": lambda: nn.Linear(6, 9),
    "embedding": lambda: nn.Embedding(7, 5),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: torch.randn(3, 6, dtype=torch.float64),
    "conv2d": lambda: torch.randn(3, 4, 5, 5, dtype=torch.float64),
    "two parts of a linear": lambda: torch.randn(3, 6, dtype=torch.float64),
    "embedding": lambda: torch.tensor([[0, 3, 1], [5, 2, 3]]),
}
PARTS = {"two parts of a linear": {"0": ["q", "v"]}}


@dataclass(frozen=True)
class VariantCase:
    """What is checked: a variant on one layer.

    Args:
        variant: The plugin.
        elsewhere: The plugin as another process has it, which has seen nothing yet.
        layer: Name of the layer, from `LAYERS`.
        device: Where it is checked.
    """

    variant: VariantPlugin
    elsewhere: VariantPlugin
    layer: str
    device: torch.device = CPU

    def registry(self) -> Registry:
        """Returns the installed plugins with this variant.

        Raises:
            PluginError: If the plugin could not be registered.
        """
        return registry_with(VARIANTS, self.variant)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """Builds the model, with the same values each time."""
        with own_randomness(0):
            return nn.Sequential(LAYERS[self.layer]()).to(self.device, dtype).eval()

    def adapt(self, model: nn.Module, **fields: Any) -> LoraModel:
        """Puts an adapter of the variant on the model."""
        parts = PARTS.get(self.layer, {})
        config = LoraConfig(**{"r": 2, "alpha": 3.0, "variant": self.variant.name, "fused_parts": parts, **fields})
        return LoraModel(model, config, registry=self.registry())

    def trained(self, dtype: torch.dtype = torch.float64, **fields: Any) -> LoraModel:
        """Returns an adapted model whose tensors are no longer what they were at the start."""
        return move(self.adapt(self.model(dtype), init="none", **fields))

    def expected(self, lora: LoraModel) -> Tensor:
        """Returns the output of the untouched layer with the weight that the variant makes of it, with gradients."""
        layer = lora.model[0]  # type: ignore[index]
        reference: Any = self.model()
        plugin = lora.plans["default"].layers[0].plugin
        weight = detached_weight(layer, "weight")
        matrix = plugin.to_matrix(weight) + sum(each.delta_weight() for each in deltas(lora).values())
        del reference[0].weight
        reference[0].weight = plugin.from_matrix(matrix, weight.shape)
        return self.run(reference)

    def refusal(self) -> str | None:
        """Returns why the variant cannot serve the layer; None if it can."""
        found = default_registry(allow=()).layer_for(type(LAYERS[self.layer]()))
        return None if found is None else self.variant.refusal(found) or None

    @property
    def looks_up(self) -> bool:
        """Whether the layer looks rows of its weight up, and so takes no dropout."""
        return not INPUTS[self.layer]().is_floating_point()

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns the output for one batch."""
        return torch.as_tensor(model(self.batch(dtype)))

    def batch(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns one batch, the same each time."""
        with own_randomness(1):
            batch = INPUTS[self.layer]()
        return batch.to(self.device, dtype if batch.is_floating_point() else batch.dtype)


def move(lora: LoraModel) -> LoraModel:
    """Moves all tensors of the adapter, as training would."""
    move_values(adapter_parameters(lora.model[0], "default"))  # type: ignore[index]
    return lora


def deltas(lora: LoraModel) -> dict[str, Term]:
    """Returns what the variant says of each slot of the layer, by the slot's suffix."""
    return {term.slot.suffix: term for term in terms_of(lora.model[0], "weight", "default")}  # type: ignore[index]
