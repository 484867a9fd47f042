"""PEFT's `adapter_config.json`: what it says of each layer, and the fields that have no meaning here."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from packaging.version import Version
from torch import Tensor

from lora_plugins.errors import AdapterFileError, ConfigError
from lora_plugins.field_checks import (
    Check,
    check_alpha,
    check_dropout,
    check_flag,
    check_name,
    check_names,
    check_patterns,
    check_rank,
    choice_of,
    is_whole,
    map_of,
    optional,
    shown,
)
from lora_plugins.files import check_expressions
from lora_plugins.formats import peft_adalora
from lora_plugins.formats.peft_patterns import PeftPatterns
from lora_plugins.formats.peft_version import version_of
from lora_plugins.formats.portable import PortableLayer, commonest
from lora_plugins.utils import path_ends

WRITTEN_FOR = "0.21.2"
"""The version of PEFT whose files are written, and the newest that is known to apply `out_proj` twice."""


def _check_expression(name: str, value: Any) -> None:
    """A regular expression."""
    check_name(name, value)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name} is {shown(value)}, which is no regular expression: {error}.") from error


def _check_targets(name: str, value: Any) -> None:
    (_check_expression if isinstance(value, str) else check_names)(name, value)


def _check_expressions(name: str, value: Any) -> None:
    check_patterns(name, value)
    for each in [value] if isinstance(value, str) else value:
        _check_expression(name, each)


def _check_numbers(name: str, value: Any) -> None:
    """The numbers of blocks, one or several."""
    for each in value if isinstance(value, list) else [value]:
        if not is_whole(each):
            raise ConfigError(f"{name} holds {shown(each)}, which is not the number of a block.")


def _by_expression(check: Check) -> Check:
    """By regular expression, values that another check takes."""

    def check_map(name: str, value: Any) -> None:
        map_of(check)(name, value)
        for key in value:
            _check_expression(name, key)

    return check_map


_CHECKED: Mapping[str, Check] = {
    "r": check_rank,
    "lora_alpha": check_alpha,
    "target_modules": _check_targets,
    "exclude_modules": _check_targets,
    "lora_dropout": check_dropout,
    "bias": choice_of("none", "all", "lora_only"),
    "use_rslora": check_flag,
    "modules_to_save": _check_expressions,
    "layers_to_transform": _check_numbers,
    "layers_pattern": _check_expressions,
    "rank_pattern": _by_expression(check_rank),
    "alpha_pattern": _by_expression(check_alpha),
    "use_dora": check_flag,
    "lora_bias": check_flag,
    "target_parameters": check_names,
}
"""The fields that say what an adapter computes, and what they can hold; None is like no field, but for two of them."""

_NEVER_NONE = frozenset(["r", "lora_alpha"])
"""The scaling of every layer, which PEFT cannot compute of None: nothing says that it would be that of the defaults."""

_UNCHECKED = frozenset(
    [
        *("peft_type", "init_lora_weights", "peft_version", "base_model_name_or_path", "revision", "task_type"),
        "auto_mapping",
        "inference_mode",
        "fan_in_fan_out",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "lora_ga_config",
        "corda_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
        "velora_config",
        "monteclora_config",
    ]
)
"""The fields that are only reported or checked elsewhere, or say nothing of what a saved adapter computes."""

_REFUSED: Mapping[str, str] = {
    "trainable_token_indices": "trained tokens of an embedding have no place here",
    "layer_replication": "replicated layers have no place here: replicate them in the model first",
    "use_qalora": "QALoRA is another method",
    "use_bdlora": "block-diagonal LoRA is another method",
    "kasa_config": "KaSA is another method",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters",
}
"""The fields that have no meaning here, and why. A field of none of the three tables is refused if it is set."""

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""The starts that leave the base alone."""

_CHANGED_INITS = ("pissa", "olora")
"""The starts that change the base in a way that can be computed again; they have the same names here."""

_FIRST_BLOCK_SINCE = Version("0.20")
"""The version of PEFT since which the number of a block is the first one in a name of several; before, the last one."""


class PeftConfig:
    """The content of an `adapter_config.json`.

    Args:
        fields: The content.
        patterns: Which of several patterns counts that match a layer: `first` or `longest`; None where they must agree.

    Raises:
        AdapterFileError: If it is of another method than LoRA, sets a field that has no meaning here, or one to what it
            cannot hold.
    """

    def __init__(self, fields: Mapping[str, Any], patterns: str | None) -> None:
        optional(choice_of("first", "longest"))("format_options: patterns", patterns)
        method = str(fields.get("peft_type")).upper()
        if method not in ("LORA", peft_adalora.METHOD):
            raise AdapterFileError(
                f"The adapter is of PEFT's method {fields.get('peft_type')!r}; only 'LORA' and 'ADALORA' can be read. "
                "Merge it in PEFT, and use the merged model; or write it as LoRA with peft.save_as_lora(path, model, "
                "rank), which new versions of PEFT have: exactly for some methods, for others as near as the rank "
                "allows."
            )
        self.is_adalora = method == peft_adalora.METHOD
        if self.is_adalora:
            used = {key: value for key, value in fields.items() if key not in peft_adalora.UNUSED}
            fields = {"init_r": 12, **used}  # by default PEFT's own rank
        wrong = [f"{key} = {fields[key]!r}: {reason}" for key, reason in _REFUSED.items() if fields.get(key)]
        unknown = fields.keys() - _CHECKED.keys() - _UNCHECKED - _REFUSED.keys()
        unknown -= peft_adalora.IDLE if self.is_adalora else set()
        wrong += [f"{key} = {fields[key]!r}: it is not known here" for key in sorted(unknown) if fields[key]]
        if wrong:
            said = "\n  ".join(["adapter_config.json says what cannot be expressed here:", *wrong])
            raise AdapterFileError(f"{said}\nWhere PEFT can merge it, merge it there, and use the merged model.")
        given = {key: value for key, value in fields.items() if value is not None or key in _NEVER_NONE}
        if given.get("layers_pattern") == "":  # PEFT asks whether it is true
            del given["layers_pattern"]
        self.fields = {key: _single(key, value) for key, value in given.items()}
        self._counts = patterns
        try:
            for key, check in _CHECKED.items():
                if key in self.fields:
                    check(key, self.fields[key])
            if self.is_adalora:
                check_rank("init_r", self.fields.get("init_r"))
        except ConfigError as error:
            raise AdapterFileError(f"adapter_config.json is damaged: {error} Copy the file again.") from error

    @property
    def init(self) -> str:
        """Our name of the init; `kaiming` for all that leave the base alone.

        Raises:
            AdapterFileError: If the start changed the base in a way that cannot be computed again.
        """
        init = self.fields.get("init_lora_weights", True)
        if init in _PLAIN_INITS:
            return "kaiming"
        if str(init).lower() not in _CHANGED_INITS:
            raise AdapterFileError(
                f"The adapter was started by {init!r}, which changed the base in a way that the file does not have. "
                "Load it in PEFT, and save it with save_pretrained(path, "
                "path_initial_model_for_weight_conversion=...), which makes it one of the untouched base; or merge it "
                "there."
            )
        return str(init).lower()

    def rank(self, name: str, A: Tensor, B: Tensor) -> float:
        """Returns the rank by which the scaling of a layer is defined: that of its tensors, or a higher one.

        Decompositions have no more ranks than the matrix, whatever the config says, and AdaLoRA has fewer than it had.

        Raises:
            AdapterFileError: If the config says another one.
        """
        if self.is_adalora:
            return peft_adalora.divisor(self.fields["init_r"])
        said = self._patterns.ranks(name)
        r, full = len(A), min(len(B), A[0].numel())
        if r == full < said[0] and self.init in _CHANGED_INITS:
            return int(said[0])
        if r not in said and r % said[0] == 0 and self.parameter_of(name.rpartition(".")[0]) == name:
            raise AdapterFileError(
                f"target_parameters: {name!r} holds several matrices, each with an A and a B of its own, which have no "
                "form here. Merge the adapter in PEFT, and use the merged model."
            )
        if r not in said:
            raise AdapterFileError(
                f"{name!r} has rank {r} in the tensors and {said[0]} in the config, by which its scaling is told. One "
                "of the two files is of another adapter."
            )
        return r

    def alpha(self, name: str, rank: float) -> float:
        """Returns the numerator of the scaling of a layer whose rank the config says; see `PeftPatterns`."""
        if self.is_adalora:
            return float(self.fields.get("lora_alpha", 8))
        return self._patterns.alpha(name, rank)

    def check_parts(self, name: str, *, magnitude: bool, bias: bool) -> None:
        """Checks that a layer has a magnitude where the adapter is one of DoRA, and a bias of B where that was trained.

        Raises:
            AdapterFileError: If the config says the opposite of the tensors.
        """
        for part, field, present in (("magnitude", "use_dora", magnitude), ("bias of B", "lora_bias", bias)):
            if self.fields.get(field, present) != present:
                raise AdapterFileError(
                    f"{name!r} has {'a' if present else 'no'} {part} in the tensors, and the config says {field} = "
                    f"{self.fields[field]}. One of the two files is of another adapter."
                )

    def check_expressions(self, names: Iterable[str]) -> None:
        """Checks that its regular expressions terminate on the names that they are matched with.

        Raises:
            AdapterFileError: If they do not.
        """
        targets = (self.fields.get(key) for key in ("target_modules", "exclude_modules"))
        blocks = self._blocks if self.fields.get("layers_pattern") else []
        compiled = [expression.pattern for expression in (*self._around, *blocks)]
        whole = [each for each in targets if isinstance(each, str)]
        check_expressions([*whole, *compiled, *self._patterns.expressions], names)

    def parameter_of(self, name: str) -> str | None:
        """Returns the full name of the parameter by which a layer is targeted; None if the layer itself is."""
        for target in self.fields.get("target_parameters", []):
            path, _, own = target.rpartition(".")
            if not path or name == path or name.endswith(f".{path}"):
                return f"{name}.{own}"
        return None

    def is_target(self, name: str) -> bool:
        """Whether a module is one that the config targets, by PEFT's rules."""
        targets = self.fields.get("target_modules", [])
        if self._is_excluded(name) or any(saved.match(name) for saved in self._around):
            return False
        return self._is_meant(name) and (isinstance(targets, str) or name in targets or self._in_block(name))

    def is_saved(self, name: str) -> bool:
        """Whether a module is one that is trained in full, by PEFT's rules."""
        return name.endswith(tuple(self.fields.get("modules_to_save", [])))

    @cached_property
    def _patterns(self) -> PeftPatterns:
        return PeftPatterns(self.fields, self._counts)

    @cached_property
    def _is_meant(self) -> Callable[[str], bool]:
        return _test(self.fields.get("target_modules", []))

    @cached_property
    def _is_excluded(self) -> Callable[[str], bool]:
        return _test(self.fields.get("exclude_modules", []))

    @cached_property
    def _around(self) -> list[re.Pattern[str]]:
        """What matches a module that is trained in full, and all inside of it."""
        return [re.compile(rf"(^|.*\.){saved}($|\..*)") for saved in self.fields.get("modules_to_save", [])]

    @cached_property
    def _blocks(self) -> list[re.Pattern[str]]:
        """What matches a name up to the number of its block, in one of the lists that the config names, or in any."""
        version = version_of(self.fields.get("peft_version", "0"))
        is_last = version is not None and version < _FIRST_BLOCK_SINCE
        named = self.fields.get("layers_pattern", [])
        lists = [named] if isinstance(named, str) else named
        start, any_start = (r".*\.", r".*\.") if is_last else (r"(?:^|.*?\.)", r".*?\.")
        expressions = [start + each for each in lists] or [f"{any_start}[^.]*"]
        return [re.compile(rf"{each}\.(?P<at>\d+)\.") for each in expressions]

    def _in_block(self, name: str) -> bool:
        blocks = self.fields.get("layers_to_transform")
        if blocks is None or blocks == []:
            return True
        found = next((match for each in self._blocks if (match := each.match(name))), None)
        return found is not None and int(found["at"]) in ([blocks] if isinstance(blocks, int) else blocks)


def _single(key: str, value: Any) -> Any:
    """Returns the value of a field, without the count beside it.

    PEFT's `convert_kohya_ss_sd_lora_to_peft.py` writes for `r` and `lora_alpha` the commonest one and how many layers
    have it. PEFT reads such a file, since the patterns that the script writes name every layer.
    """
    return value[0] if key in ("r", "lora_alpha") and isinstance(value, list) and len(value) == 2 else value


def config_fields(layers: Mapping[str, PortableLayer], **given: Any) -> dict[str, Any]:
    """Returns the content of an `adapter_config.json`, with further fields that are given.

    It names the layers in full, except for output projections of attentions: PEFT adapts those with the attention.
    """
    r, alpha = commonest(each.r for each in layers.values()), commonest(each.alpha for each in layers.values())
    named = {name: layer for name, layer in layers.items() if not layer.in_attention}
    return {
        "peft_type": "LORA",
        "peft_version": WRITTEN_FOR,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": "|".join(map(re.escape, sorted(named))),
        "rank_pattern": _exact_patterns({name: layer.r for name, layer in named.items()}, r),
        "alpha_pattern": _exact_patterns({name: layer.alpha for name, layer in named.items()}, alpha),
        **given,
    }


def _exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns the values that differ from the default, by patterns.

    PEFT lets a pattern match the end of a name, the first one that does counts, and it loses their order when it saves.
    So a pattern that is the end of another layer's name is anchored at the start.
    """
    ends = {end for name in values for end in path_ends(name)[:-1]}
    return {("^" if name in ends else "") + re.escape(name): each for name, each in values.items() if each != default}


def _test(patterns: Sequence[str] | str) -> Callable[[str], bool]:
    """Returns whether a name is one that a field means, by PEFT's rules."""
    if isinstance(patterns, str):
        expression = re.compile(patterns)
        return lambda name: expression.fullmatch(name) is not None
    ends = set(patterns)
    return lambda name: not ends.isdisjoint(path_ends(name))
