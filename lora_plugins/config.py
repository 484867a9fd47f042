"""The configuration of one adapter."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_plugins.errors import ConfigError, near


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How LoRA is applied to a model (Hu et al., arXiv 2106.09685).

    Names and patterns speak of module names as `model.named_modules()` gives them. Every pattern of every field has
    to match something; one that does not is an error that names it and its nearest names.

    Args:
        r: Rank of the update `B @ A`.
        alpha: The update is scaled by `alpha / r`, or by `alpha / sqrt(r)` with `use_rslora`.
        dropout: Probability of dropping an element of the input of the update branch during training. A layer that
            cannot honour it refuses it.
        target_modules: The layers to adapt. A list matches whole path components from the end (`["attn.qkv"]`), a
            string is a regular expression over the full name, and `all` means every layer that some plugin handles,
            except those in `modules_to_save`.
        exclude_modules: Layers that are not adapted although `target_modules` matches them; same forms.
        bias: Which biases are trained: `none`, `all` of the model, or those of adapted layers (`lora_only`).
        modules_to_save: Modules (or single parameters) that are trained in full and saved with the adapter, such as
            a new head; matched as a list in `target_modules` is.
        layers_to_transform: Adapt only these blocks. A number is an index in a block container; a string is the
            path of a block, such as `stages.2.blocks.5`.
        layers_pattern: Names of the block containers that numbers in `layers_to_transform` count in. By default the
            usual names (`layers`, `h`, `blocks`, ...) are found.
        rank_pattern: Ranks of single layers or blocks. A key is a path, matched as whole components anywhere in the
            name, or a regular expression over the name. The key with most path components wins; a tie is an error.
        alpha_pattern: Alphas of single layers or blocks; keys as in `rank_pattern`.
        fused_parts: For layers that hold query, key and value in one matrix: which of `q`, `k` and `v` are adapted,
            each with its own A and B, by layer pattern: `{"attn.qkv": ["q", "v"]}`.
        init: Name of the plugin that sets the first A and B: `kaiming`, `gaussian`, `loftq`, `none` (not an
            identity, for debugging), or that of an installed plugin.
        init_options: Options of that plugin.
        use_rslora: Rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).
        norm: `freeze` keeps frozen normalisation layers in eval mode, so that their running statistics stand still;
            `track` lets the statistics move and saves them with the adapter.

    Raises:
        ConfigError: If a value is out of range, naming the field.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: list[str] | str = "all"
    exclude_modules: list[str] | str = field(default_factory=list)
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] = field(default_factory=list)
    layers_to_transform: list[int | str] | int | str | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fused_parts: dict[str, list[str]] = field(default_factory=dict)
    init: str = "kaiming"
    init_options: dict[str, Any] = field(default_factory=dict)
    use_rslora: bool = False
    norm: Literal["freeze", "track"] = "freeze"

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("alpha", self.alpha)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is a probability from 0 up to, not including, 1, not {self.dropout!r}.")
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            _check_names(name, getattr(self, name))
        if not self.target_modules:
            raise ConfigError("target_modules is empty. Name the layers to adapt, or write 'all'.")
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save is a list of names, not the string {self.modules_to_save!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where layers_to_transform counts; set layers_to_transform too.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain types, ready for JSON, YAML or a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraConfig":
        """Builds a config from plain types.

        Raises:
            ConfigError: If a key is no field of `LoraConfig`, naming the nearest one.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise ConfigError(f"LoraConfig has no field {key!r}. {near(key, fields)}")
        return cls(**values)


_CHOICES: Mapping[str, tuple[str, ...]] = {"bias": ("none", "all", "lora_only"), "norm": ("freeze", "track")}


def _check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is a rank, a whole number of at least 1, not {value!r}.")


def _check_alpha(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is a positive, finite number, not {value!r}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}. {near(str(value), choices)}")


def _check_names(name: str, value: list[str] | str | None) -> None:
    for entry in [value] if isinstance(value, str) else value or []:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"{name} holds {entry!r}, which is not the name of a module.")
