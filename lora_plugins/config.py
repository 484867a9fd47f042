"""The configuration of one adapter."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from lora_plugins.errors import ConfigError, listing
from lora_plugins.field_checks import (
    Check,
    check_alpha,
    check_blocks,
    check_dropout,
    check_fields,
    check_flag,
    check_kept_options,
    check_name,
    check_names,
    check_parts,
    check_patterns,
    check_rank,
    choice_of,
    map_of,
    optional,
)
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

    Names and patterns speak of module names as `model.named_modules()` gives them, without the modules that
    `torch.compile`, `checkpoint_wrapper` and FSDP of torch insert. Every pattern of every field has to match something;
    one that does not is an error that names it and its nearest names.

    Args:
        r: Rank of the update `B @ A`.
        alpha: The update is scaled by `alpha / r`, or by `alpha / sqrt(r)` with `use_rslora`.
        dropout: Probability of dropping an element of the input of the update branch during training. A layer that
            cannot honor it refuses it. Linear layers and convolutions round it to a multiple of 1/256, so that 0.1
            really drops 0.1016 of them (and scales by that), or of 1/65536 where 1/256 is more than 2 % off; on a GPU
            under `torch.compile` it is exact.
        target_modules: The layers to adapt. A list matches whole path components from the end (`["attn.qkv"]`), a
            string is a regular expression over the full name, and `all` means every layer that some plugin handles,
            except those in `modules_to_save`. Left out, it is what the module itself suggests (our tasks do, for
            the architecture they train), or else `all`.
        exclude_modules: Layers that are not adapted although `target_modules` matches them; same forms.
        bias: Which biases are trained: `none`, `all` of the model, or those of adapted layers (`lora_only`).
        modules_to_save: Modules (or single parameters) that are trained in full and saved with the adapter, such as
            a new head; matched as a list in `target_modules` is, and `^head` is that of the whole model alone.
        layers_to_transform: Adapt only these blocks. A number is an index in a block container; a string is the
            path of a block, such as `stages.2.blocks.5`.
        layers_pattern: Names of the block containers that numbers in `layers_to_transform` count in, or ends of their
            paths (`encoder.layers`). By default the usual names (`layers`, `h`, `blocks`, ...) are found.
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
        norm: `freeze` keeps frozen normalization layers in eval mode, so that their running statistics do not change;
            `track` lets the statistics move and saves them with the adapter.
        allow_plugins: Names of the only installed plugins to load, besides the built-in ones; None for all.
        block_plugins: Names of installed plugins not to load; `distribution:name` where several have a name.

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
        for name in _CHECKS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        check_fields(vars(self), _CHECKS)
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


def rank_divisor(r: float, *, use_rslora: bool) -> float:
    """Returns what alpha is divided by at a rank, to give the scaling; of a ratio of ranks, the ratio of these."""
    return math.sqrt(r) if use_rslora else r


@dataclass(frozen=True)
class LayerSettings:
    """The settings of one layer that follow from a config.

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
        """Returns the settings of a layer that has its own rank and alpha."""
        scaling = alpha / rank_divisor(r, use_rslora=config.use_rslora)
        return cls(r, alpha, scaling, config.dropout, config.memory == "low")


_CHECKS: Mapping[str, Check] = {
    "r": check_rank,
    "alpha": check_alpha,
    "dropout": check_dropout,
    "target_modules": optional(check_patterns),
    "exclude_modules": check_patterns,
    "bias": choice_of("none", "all", "lora_only"),
    "modules_to_save": check_names,
    "layers_to_transform": check_blocks,
    "layers_pattern": optional(check_patterns),
    "rank_pattern": map_of(check_rank),
    "alpha_pattern": map_of(check_alpha),
    "fused_parts": map_of(check_parts),
    "init": check_name,
    "init_options": check_kept_options,
    "variant": check_name,
    "quantize": optional(check_name),
    "quantize_options": check_kept_options,
    "quantize_modules": optional(check_patterns),
    "use_rslora": check_flag,
    "memory": choice_of("normal", "low"),
    "norm": choice_of("freeze", "track"),
    "allow_plugins": optional(check_names),
    "block_plugins": check_names,
}


def _plain(value: Any) -> Any:
    """Returns a value with lists, dictionaries, texts and numbers for those of any class, as files have them.

    A config then equals the one that comes back from a file, whether a tuple, a library of configurations, an
    enumeration or NumPy gave it, whose texts and numbers no checkpoint is read with.
    """
    if isinstance(value, Mapping):
        return {_plain(key) if isinstance(key, str) else key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration's own __str__ gives its name
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    return [_plain(entry) for entry in value] if is_list else value
