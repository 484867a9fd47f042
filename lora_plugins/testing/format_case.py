"""What the conformance kit for formats checks with: small models, their adapters, and the files of these."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.config import LoraConfig
from lora_plugins.errors import AdapterFileError
from lora_plugins.model import LoraModel
from lora_plugins.plugins import FORMATS, AdapterFormat, Registry
from lora_plugins.testing.registry_under_test import registry_with
from lora_plugins.utils import own_randomness

ALPHAS = (10 / 3, 13 / 3)
"""The alphas of the adapter that is checked: a text of six digits does not hold them."""

PATTERNS: Sequence[Mapping[str, Any]] = (
    {"rank_pattern": {"to_out": 3}, "alpha_pattern": {"to_q": ALPHAS[1]}},
    {"rank_pattern": {"to_out": 3}},
    {"alpha_pattern": {"to_q": ALPHAS[1]}},
    {},
)
"""How the two layers of that adapter differ, from formats that hold all to those with one rank and alpha for a file."""


class Block(nn.Module):
    """Two layers with names of several components, and one that no adapter touches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(width, 6), "to_out": nn.Linear(6, 3)})
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Computes `(n, 2)` from `(n, width)`."""
        y: Tensor = self.last(self.attn["to_out"](self.attn["to_q"](x).tanh()).tanh())
        return y


class Pair(nn.Module):
    """Two layers of one shape, whose names end alike, with a capital letter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleDict({"Proj": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Computes `(n, 4)` from `(n, 4)`."""
        y: Tensor = self.down["Proj"](self.up["Proj"](x).tanh())
        return y


class Dotted(nn.Module):
    """Two layers of one shape, whose names differ only in a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_proj = nn.ModuleDict({"proj": nn.Linear(4, 4)}), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Computes `(n, 4)` from `(n, 4)`."""
        y: Tensor = self.up_proj(self.up["proj"](x).tanh())
        return y


class Single(nn.Module):
    """One layer that is no linear one.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, *inputs: Tensor) -> Tensor:
        """Computes what the layer does."""
        y = self.inner["layer"](*inputs)
        return torch.as_tensor(y[0] if isinstance(y, tuple) else y)


def _images() -> list[Tensor]:
    return [torch.randn(2, 3, 5, 4, dtype=torch.float64)]


LAYERS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Sequence[Tensor]]]] = {
    "two layers whose names end alike": (Pair, lambda: [torch.randn(5, 4, dtype=torch.float64)]),
    "two layers whose names differ only in a dot": (Dotted, lambda: [torch.randn(5, 4, dtype=torch.float64)]),
    "a convolution": (lambda: Single(nn.Conv2d(3, 4, 3)), _images),
    "a convolution with kernels of one pixel": (lambda: Single(nn.Conv2d(3, 4, 1)), _images),
    "an embedding": (lambda: Single(nn.Embedding(7, 4)), lambda: [torch.arange(7)]),
    "an nn.MultiheadAttention": (
        lambda: Single(nn.MultiheadAttention(4, 2)),
        lambda: [torch.randn(3, 2, 4, dtype=torch.float64)] * 3,
    ),
}
"""Models of layers that other libraries adapt too, and what they are called with."""


@dataclass(frozen=True)
class FormatCase:
    """What is checked: a format, and how it is asked to write.

    Args:
        plugin: The format that writes.
        elsewhere: The format that reads, as another process has it: it has not seen what was written.
        file_name: Name of the file or folder to write.
        options: The options that the format is given.
        patterns: How the layers differ.
        width: Inputs of the model.
        seed: Of the values that its adapters have.
    """

    plugin: AdapterFormat
    elsewhere: AdapterFormat
    file_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    patterns: Mapping[str, Any] = field(default_factory=lambda: PATTERNS[0])
    width: int = 4
    seed: int = 1

    def varied(self) -> "FormatCase":
        """Returns this case with layers that differ as much as the format can write."""
        for patterns in PATTERNS:
            case = replace(self, patterns=patterns)
            try:
                with case.written():
                    return case
            except AdapterFileError:
                continue
            except Exception:  # for the checks to find
                break
        return self

    def registry(self) -> Registry:
        """Returns the installed plugins with this format alone of its kind.

        Raises:
            PluginError: If the format could not be registered.
        """
        return registry_with(FORMATS, self.plugin)

    def model(self) -> nn.Module:
        """Builds the model, with the same values each time."""
        with own_randomness(0):
            return Block(self.width).double().eval()

    def trained(self, **fields: Any) -> LoraModel:
        """Returns an adapted model, its layers of different ranks and scalings, that computes something of its own."""
        return self.adapted(self.model(), **{"target_modules": ["to_q", "to_out"], **self.patterns, **fields})

    def adapted(self, model: nn.Module, **fields: Any) -> LoraModel:
        """Adapts a model so that it computes something of its own."""
        config = LoraConfig(**{"r": 2, "alpha": ALPHAS[0], **fields})
        lora = LoraModel(model, config, registry=self.registry())
        with torch.no_grad(), own_randomness(self.seed):
            for parameter in lora.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter))
        return lora

    @contextmanager
    def written(self) -> Iterator[tuple[LoraModel, Path]]:
        """Gives an adapted model and the file that it was written to, for the duration of the block."""
        lora = self.trained()
        with tempfile.TemporaryDirectory() as folder:
            yield lora, self.write(lora, Path(folder))

    def write(self, lora: LoraModel, folder: Path) -> Path:
        """Writes the adapter of a model into a folder."""
        return lora.save_adapter(folder / self.file_name, format=self.plugin.name, format_options=self.options)

    def load(self, model: nn.Module, path: Path) -> LoraModel:
        """Puts the adapter of a file on a model; the file has to be recognized."""
        registry = replace(self, plugin=self.elsewhere).registry()
        return LoraModel.load_adapter(model, path, format_options=self.options, registry=registry)

    def run(self, model: nn.Module) -> Tensor:
        """Returns the output for one batch."""
        with own_randomness(2):
            return torch.as_tensor(model(torch.randn(5, self.width, dtype=torch.float64)))
