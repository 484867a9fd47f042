"""An init plugin with one choice of its options: the small model that the checks start, and its data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.adapter import InitData, calibrate, init_context
from lora_plugins.config import LoraConfig
from lora_plugins.inplace import detached_weight
from lora_plugins.model import LoraModel
from lora_plugins.plugins import INITS, InitContext, InitPlugin, Registry, SlotCalibration
from lora_plugins.testing.registry_under_test import registry_with
from lora_plugins.utils import own_randomness

LAYERS: Mapping[str, int] = {"embedding": 24, "linear": 32, "conv2d": 16}
"""The layers of the model by name, with the number of rows of each matrix."""


class Small(nn.Module):
    """A word from an embedding is added to an image; linear layer and convolution of unlike shapes follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.linear = nn.Linear(24, 32)
        self.conv2d = nn.Conv2d(2, 16, 3)

    def forward(self, word: Tensor) -> Tensor:
        """Returns `(n, 16, 2, 2)` for words `(n,)`."""
        x: Tensor = self.linear(self.embedding(word))
        return torch.as_tensor(self.conv2d(F.silu(x).view(-1, 2, 4, 4)))


@dataclass(frozen=True)
class InitCase:
    """What is checked.

    Args:
        init: The plugin.
        elsewhere: The plugin as another process has it, which has started nothing yet.
        options: Its options.
        r: The rank.
        layers: Which layers of the model are adapted.
    """

    init: InitPlugin
    elsewhere: InitPlugin
    options: Mapping[str, Any]
    r: int
    layers: tuple[str, ...]

    def registry(self) -> Registry:
        """Returns a registry of this init and the built-in layer types.

        Raises:
            PluginError: If the plugin could not be registered.
        """
        return registry_with(INITS, self.init)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Small:
        """Builds the model, with the same values for the same seed."""
        with own_randomness(seed):
            return Small().to(dtype).eval()

    def config(self, **fields: Any) -> LoraConfig:
        """Returns the configuration that starts the model with the init."""
        return LoraConfig(
            **{
                "r": self.r,
                "alpha": 2.0 * self.r,
                "target_modules": list(self.layers),
                "init": self.init.name,
                "init_options": dict(self.options),
                **fields,
            }
        )

    def data(self) -> InitData | None:
        """Returns what an init learns from; None for one that needs no data."""
        if self.init.needs is None:
            return None
        return InitData([words() for _ in range(2)], step=lambda model, batch: loss(model(batch)))

    def adapt(self, model: nn.Module, **fields: Any) -> LoraModel:
        """Starts an adapter on the model."""
        return LoraModel(model, self.config(**fields), registry=self.registry(), init_data=self.data())

    def contexts(self, model: nn.Module, seed: int = 0) -> list[InitContext]:
        """Returns what the init is handed for each layer, with A and B full of NaN."""
        plan = LoraModel.plan(model, self.config(), registry=self.registry())
        data = self.data()
        seen = calibrate(model, plan, data).of(plan) if data else {}
        return [
            init_context(
                plan,
                layer,
                slot,
                detached_weight(model.get_submodule(layer.name), slot.tensor),
                seen.get((layer.name, slot.suffix), SlotCalibration()),
                torch.Generator().manual_seed(seed),
            )
            for layer, slot, _ in plan.slots()
        ]


def words() -> Tensor:
    """Returns a batch of words, all that there are."""
    return torch.arange(20)


def loss(output: Tensor) -> Tensor:
    """Returns a loss that depends on every weight."""
    return output.square().mean() + output.mean()


def run(model: nn.Module) -> Tensor:
    """Returns the output of a model for all words."""
    with torch.no_grad():
        return torch.as_tensor(model(words()))


def layer_weights(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Returns the weights of layers as they are read, with their updates."""
    return {name: model.get_submodule(name).weight.detach().clone() for name in layers}  # type: ignore[operator]
