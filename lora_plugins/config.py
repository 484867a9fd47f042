"""The configuration of one adapter."""

import dataclasses
import functools
import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from lora_plugins.errors import ConfigError, listing, near
from lora_plugins.words import FIELDS, READ_OF_CONFIGS, said_of

T = TypeVar("T")


def _with_known_fields(cls: type[T]) -> type[T]:
    """Lets a dataclass name the nearest field where it is given one that it does not have."""
    init = cls.__init__
    known = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: Any, *values: Any, **fields: Any) -> None:
        said: dict[str, list[str]] = {}
        for key in fields:
            if key not in known:
                said.setdefault(said_of(key, FIELDS, known), []).append(key)
        if said:
            lines = [f"LoraConfig has no field {listing(keys, len(keys))}. {word}" for word, keys in said.items()]
            raise ConfigError("\n".join(lines))
        if values:
            raise TypeError(
                f"LoraConfig takes its fields by name, not {listing(values)} by place: LoraConfig(r=8, "
                "target_modules=['qkv'])."
            )
        init(self, **fields)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


@_with_known_fields
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How LoRA is applied to a model (Hu et al., arXiv 2106.09685).

    Names and patterns speak of module names as `model.named_modules()` gives them. Every pattern of every field has
    to match something; one that does not is an error that names it and its nearest names.

    Args:
        r: Rank of the update `B @ A`.
        alpha: The update is scaled by `alpha / r`, or by `alpha / sqrt(r)` with `use_rslora`.
        dropout: Probability of dropping an element of the input of the update branch during training. A layer that
            cannot honor it refuses it. Linear layers and convolutions draw one byte for each element, so that 0.1
            really drops 0.1016 of them (and scales by that); on a GPU under `torch.compile` it is exact.
        target_modules: The layers to adapt. A list matches whole path components from the end (`["attn.qkv"]`), a
            string is a regular expression over the full name, and `all` means every layer that some plugin handles,
            except those in `modules_to_save`. Left out, it is what the module itself suggests (our tasks do, for
            the architecture they train), or else `all`.
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
            each with its own A and B, by layer pattern: `{"attn.qkv": ["q", "v"]}`. A path that ends the
            name of a layer means that layer, not those below it.
        init: Name of the plugin that sets the first A and B: `kaiming`, `gaussian`, `orthogonal`, `pissa`, `olora`,
            `loftq`, `eva` and `lora_ga` (both learn from data), `none` (not an identity, for debugging), or that of an
            installed plugin.
        init_options: Options of that plugin.
        variant: `lora`, or the name of a plugin that lets A and B change the weight in another way: `dora`.
        quantize: `nf4`, `int8`, or the name of an installed storage: how the weights of adapted layers are stored, in
            place of their float values; None leaves them as they are.
        quantize_options: Options of that storage, and `min_size`: smaller weights stay float (by default below 4096
            elements).
        quantize_modules: The layers whose weights are stored, in the forms of `target_modules`, where they are not the
            adapted ones. Layers in `modules_to_save` and those that no plugin handles stay float in any case.
        use_rslora: Rank-stabilized scaling (Kalajdzievski, arXiv 2312.03732).
        memory: `low` keeps less for the backward: the input of an adapted layer is computed again where it is the
            output of a normalization or an activation. `normal` keeps the input of each adapted layer, once.
        norm: `freeze` keeps frozen normalization layers in eval mode, so that their running statistics stand still;
            `track` lets the statistics move and saves them with the adapter.
        allow_plugins: Names of the only installed plugins to load, besides the built-in ones; None for all.
        block_plugins: Names of installed plugins not to load.

    Raises:
        ConfigError: If a value is out of range, naming the field.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
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
    variant: str = "lora"
    quantize: str | None = None
    quantize_options: dict[str, Any] = field(default_factory=dict)
    quantize_modules: list[str] | str | None = None
    use_rslora: bool = False
    memory: Literal["normal", "low"] = "normal"
    norm: Literal["freeze", "track"] = "freeze"
    allow_plugins: list[str] | None = None
    block_plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
            object.__setattr__(self, name, _listed(getattr(self, name)))
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("target_modules is empty. Name the layers to adapt, or write 'all'.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where layers_to_transform counts; set layers_to_transform too.")
        for name in ("quantize_options", "quantize_modules"):
            if getattr(self, name) and self.quantize is None:
                raise ConfigError(f"{name} says something of stored weights; set quantize too.")
        if self.quantize_modules is not None and not self.quantize_modules:
            raise ConfigError("quantize_modules is empty. Name the layers to store, or leave it out.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain types, ready for JSON, YAML or a checkpoint."""
        return dataclasses.asdict(self)

    if not TYPE_CHECKING:  # a type checker shall go on to find what does not exist

        def __getattr__(self, name: str) -> NoReturn:
            hint = "" if name.startswith("_") else said_of(name, READ_OF_CONFIGS, type(self).__dataclass_fields__)
            raise AttributeError(f"LoraConfig has no attribute {name!r}. {hint}".rstrip())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraConfig":
        """Builds a config from plain types.

        Raises:
            ConfigError: If a key is no field of `LoraConfig`, naming the nearest one.
        """
        return cls(**values)


@dataclass(frozen=True)
class LayerSettings:
    """What a config comes to for one layer.

    Args:
        r: Rank.
        alpha: Numerator of the scaling.
        scaling: Factor of `B @ A`.
        dropout: Probability of dropping an element of the branch's input during training.
        low_memory: Whether the branch computes its input again in the backward where it can.
    """

    r: int
    alpha: float
    scaling: float
    dropout: float
    low_memory: bool

    @classmethod
    def of(cls, config: LoraConfig, r: int, alpha: float) -> "LayerSettings":
        """Returns the settings of a layer with a rank and an alpha of its own."""
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        return cls(r, alpha, scaling, config.dropout, config.memory == "low")


Check = Callable[[str, Any], None]
"""Raises a ConfigError for a value that the field of that name cannot have."""


MAX_RANK = 2**16
"""The largest rank that is taken: more than the smaller side of any weight that is trained in practice."""


def shown(value: Any) -> str:
    """Returns a value for a message, cut where it is long; Python refuses to write integers of thousands of digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise ConfigError(f"{name} is a rank, a whole number from 1 to {MAX_RANK}, not {shown(value)}.")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name} is a positive, finite number, not {shown(value)}.")


def _check_dropout(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{name} is a probability from 0 up to, not including, 1, not {shown(value)}.")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is True or False, not {shown(value)}.")


def _check_name(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} holds {shown(value)}, which is not a name.")


def _check_optional_name(name: str, value: Any) -> None:
    if value is not None:
        _check_name(name, value)


def _check_names(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is a list of names, not {shown(value)}.")
    for entry in value:
        _check_name(name, entry)


def _check_optional_names(name: str, value: Any) -> None:
    if value is not None:
        _check_names(name, value)


def _check_parts(name: str, value: Any) -> None:
    _check_names(name, value)
    if not value:
        raise ConfigError(f"{name} is empty. Name the parts to adapt, or leave the key out for the whole layer.")


def _check_patterns(name: str, value: Any) -> None:
    (_check_name if isinstance(value, str) else _check_names)(name, value)


def _check_optional_patterns(name: str, value: Any) -> None:
    if value is not None:
        _check_patterns(name, value)


def _check_blocks(name: str, value: Any) -> None:
    for block in value if isinstance(value, list | tuple) else [] if value is None else [value]:
        index = isinstance(block, int) and not isinstance(block, bool) and 0 <= block <= sys.maxsize
        if not index and not (isinstance(block, str) and block):
            raise ConfigError(
                f"{name} holds {shown(block)}. A block is a number from 0 on, or a path such as 'blocks.2'."
            )


def _check_options(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} maps names to values; it is not {shown(value)}.")
    for key in value:
        _check_name(name, key)


def _map_of(check: Check) -> Check:
    def check_map(name: str, value: Any) -> None:
        _check_options(name, value)
        for key, entry in value.items():
            check(f"{name}[{key!r}]", entry)

    return check_map


def _choice_of(*choices: str) -> Check:
    def check_choice(name: str, value: Any) -> None:
        if value not in choices:
            raise ConfigError(f"{name} is {shown(value)}. {near(shown(value), choices)}")

    return check_choice


def _listed(value: Any) -> Any:
    """Returns a value with lists for tuples, so that a config equals the one that comes back from a file."""
    if isinstance(value, tuple):
        return list(value)
    return {key: _listed(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: Mapping[str, Check] = {
    "r": _check_rank,
    "alpha": _check_alpha,
    "dropout": _check_dropout,
    "target_modules": _check_optional_patterns,
    "exclude_modules": _check_patterns,
    "bias": _choice_of("none", "all", "lora_only"),
    "modules_to_save": _check_names,
    "layers_to_transform": _check_blocks,
    "layers_pattern": _check_optional_patterns,
    "rank_pattern": _map_of(_check_rank),
    "alpha_pattern": _map_of(_check_alpha),
    "fused_parts": _map_of(_check_parts),
    "init": _check_name,
    "init_options": _check_options,
    "variant": _check_name,
    "quantize": _check_optional_name,
    "quantize_options": _check_options,
    "quantize_modules": _check_optional_patterns,
    "use_rslora": _check_flag,
    "memory": _choice_of("normal", "low"),
    "norm": _choice_of("freeze", "track"),
    "allow_plugins": _check_optional_names,
    "block_plugins": _check_names,
}
