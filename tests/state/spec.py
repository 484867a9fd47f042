"""What the judge asks of `add_adapter`: full names only, so that the reference needs no pattern matching."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lora_plugins import LoraConfig

CHANGING = frozenset({"pissa", "olora", "loftq"})
"""The inits that replace the base weight."""


@dataclass(frozen=True)
class Spec:
    """One adapter to add.

    Args:
        sites: Full names of the layers.
        r: Rank.
        alpha: Numerator of the scaling.
        ranks: Ranks of single layers.
        alphas: Alphas of single layers.
        rslora: Whether the scaling is rank-stabilized.
        dropout: Of the branch.
        bias: Which biases are trained.
        saves: Modules that are trained in full.
        parts: Parts of single layers, in place of the whole.
        init: How A and B start.
        variant: How they change the weight.
        norm: What running statistics do.
        memory: What is kept for the backward.
        quantize: How the weights of the layers are stored; None for floating numbers.
    """

    sites: tuple[str, ...]
    r: int = 2
    alpha: float = 4.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    saves: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    init: str = "kaiming"
    variant: str = "lora"
    norm: str = "freeze"
    memory: str = "normal"
    quantize: str | None = None

    def config(self) -> LoraConfig:
        """Returns the configuration that asks for it."""
        return LoraConfig(**self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Returns the fields of the configuration that are not at their default."""
        wanted = {
            "r": self.r,
            "alpha": self.alpha,
            "target_modules": list(self.sites),
            "rank_pattern": {_exactly(name): r for name, r in self.ranks.items()},
            "alpha_pattern": {_exactly(name): alpha for name, alpha in self.alphas.items()},
            "use_rslora": self.rslora,
            "dropout": self.dropout,
            "bias": self.bias,
            "modules_to_save": list(self.saves),
            "fused_parts": {_exactly(name): list(parts) for name, parts in self.parts.items()},
            "init": self.init,
            "init_options": {"bits": 8} if self.init == "loftq" and self.quantize is None else {},
            "variant": self.variant,
            "norm": self.norm,
            "memory": self.memory,
            "quantize": self.quantize,
            "quantize_options": {"min_size": 0} if self.quantize else {},
        }
        default = LoraConfig()
        return {key: value for key, value in wanted.items() if value != getattr(default, key)}

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = Spec(self.sites)
        shown = [f"{key}={value!r}" for key, value in given.items() if key == "sites" or value != getattr(plain, key)]
        return f"Spec({', '.join(shown)})"


def _exactly(name: str) -> str:
    """A pattern for one layer alone: a bare path would match the layers below it too."""
    return f"^{name.replace('.', '[.]')}$"
