"""PEFT's `rank_pattern` and `alpha_pattern`: the rank and the alpha that a config says of a layer.

What a pattern means has changed from version to version, and a config says which one wrote it since PEFT 0.18.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from packaging.version import Version

from lora_plugins.formats.peft_version import version_of
from lora_plugins.formats.portable_format import UntoldError


@dataclass(frozen=True)
class _Rule:
    """What patterns mean.

    Args:
        since: The first version of PEFT in which they mean it.
        form: The expression for the name of a layer, with a place for the pattern.
        joint: Whether one pattern is for both: that of a rank where one matches.
    """

    since: Version
    form: str
    joint: bool = False


_RULES = (
    _Rule(Version("0.15"), r"(.*\.)?({})$"),
    _Rule(Version("0.14"), r".*\.{}$"),
    _Rule(Version("0.6"), r".*\.{}$", joint=True),
)
"""The rules of all versions, newest first."""


class _Field:
    """One of the two fields: its values by pattern, the one that counts first, and the value of all other layers."""

    def __init__(self, values: Mapping[str, Any], default: Any) -> None:
        self._values = values
        self._default = default
        self._expressions = cache(self._compiled)

    def keys(self, name: str, form: str) -> list[str]:
        """Returns the patterns that match a layer."""
        return [key for expression, key in self._expressions(form) if expression.match(name)]

    def value(self, key: str) -> Any:
        """Returns the value of a pattern, or of a layer by its name."""
        return self._values.get(key, self._default)

    def _compiled(self, form: str) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(form.format(key)), key) for key in self._values]


class PeftPatterns:
    """What a config says of the rank and alpha of each layer.

    Args:
        fields: The config, whose patterns are regular expressions.
        counts: Which of several patterns counts that match a layer, the `first` or the `longest`; None where they must
            agree. If it is given and the config names no version, the newest rule that gives a layer its rank holds.

    Attributes:
        expressions: What the names of layers are matched with.
    """

    def __init__(self, fields: Mapping[str, Any], counts: str | None) -> None:
        values = {key: fields.get(key, {}) for key in ("rank_pattern", "alpha_pattern")}
        if counts == "longest":
            values = {key: dict(sorted(each.items(), key=lambda item: -len(item[0]))) for key, each in values.items()}
        self._ranks = _Field(values["rank_pattern"], fields.get("r", 8))
        self._alphas = _Field(values["alpha_pattern"], fields.get("lora_alpha", 8))
        self._counts = counts
        version = fields.get("peft_version")
        self._rules = _RULES if version is None else (_rule(version),)
        self._pairs = cache(self._said)
        keys = [key for each in values.values() for key in each]
        self.expressions = [rule.form.format(key) for rule in self._rules for key in keys]

    def ranks(self, name: str) -> list[Any]:
        """Returns the ranks that a layer may have."""
        return [rank for rank, _, _ in self._pairs(name)]

    def alpha(self, name: str, rank: float) -> float:
        """Returns the numerator of the scaling of a layer that has one of its possible ranks.

        Raises:
            UntoldError: If several patterns match, with different values: PEFT sorts them when it saves, where the
                first one counted in training. Or if it depends on the version of PEFT, which is not known.
        """
        said = [(alpha, rule) for own, alpha, rule in self._pairs(name) if own == rank]
        alphas = list(dict.fromkeys(alpha for alpha, _ in said))
        if self._counts is not None or len(alphas) == 1:
            return float(alphas[0])
        if any(len({alpha for alpha, own in said if own == rule}) > 1 for rule in self._rules):
            raise UntoldError(
                f"alpha_pattern says {alphas} of {name!r}. In training the first pattern that matches counts, and "
                "PEFT loses their order when it saves. Say which: format_options={'patterns': 'first'} is how PEFT "
                "reads the file, 'longest' takes the longest pattern."
            )
        by_version = ", ".join(f"{alpha} since {rule.since}" for alpha, rule in said)
        raise UntoldError(
            f"The alpha of {name!r} depends on the version of PEFT that trained the adapter ({by_version}), which its "
            'config does not say. Write it there, such as "peft_version": "0.13.2".'
        )

    def _said(self, name: str) -> list[tuple[Any, Any, _Rule]]:
        """Returns the pairs of rank and alpha that a layer may have, each with its rule, in the order they count."""
        found: list[tuple[Any, Any, _Rule]] = []
        for rule in self._rules:
            ranks, alphas = self._ranks.keys(name, rule.form), self._alphas.keys(name, rule.form)
            both = [(key, key) for key in ranks or alphas or [name]]
            pairs = both if rule.joint else product(ranks or [name], alphas or [name])
            found += [(self._ranks.value(rank), self._alphas.value(alpha), rule) for rank, alpha in pairs]
        return found


def _rule(version: Any) -> _Rule:
    """Returns the rule of the version of PEFT that a config names; the newest rule if that is not a version."""
    known = version_of(version)
    if known is None:
        return _RULES[0]
    return next((rule for rule in _RULES if rule.since <= known), _RULES[-1])
