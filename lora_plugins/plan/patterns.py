"""Matching of module names: by whole path components, and by regular expressions."""

import re
from collections.abc import Callable, Iterable, Sequence

from lora_plugins.errors import ConfigError, TargetError, near, quoted
from lora_plugins.utils import path_ends, plain_name

_LITERAL = re.compile(r"[\w\-./:]+")

_REPEAT = re.compile(r"[*+}]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_OPTION = re.compile(r"(?<!\()\?")
"""What may be there or not; not the mark of a kind of groups, as in `(?:`."""

_MOST_CHOICES = 8
"""How many choices of two ways an expression may leave: together they make 256 ways to match a name."""


def ends_with(pattern: str, name: str) -> bool:
    """Whether the last path components of `name` are those of `pattern`."""
    return any(f".{name}".endswith(f".{each}") for each in spellings(pattern))


def shortest_ends(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """Returns the shortest path ends that match some names and none of the others; none where these do not exist.

    None of them begins with a number, except for names that are nothing else.
    """
    every, wanted = list(names), set(wanted)
    others = [name for name in every if name not in wanted]
    ends: list[str] = []
    for name in every:
        if name in wanted and not any(ends_with(end, name) for end in ends):
            telling = (end for end in path_ends(name) if end == name or not end.partition(".")[0].isdigit())
            end = next((end for end in telling if not any(ends_with(end, other) for other in others)), None)
            if end is None:
                return []
            ends.append(end)
    return ends


def compiled(field: str, pattern: str) -> re.Pattern[str]:
    """Compiles a regular expression.

    Raises:
        ConfigError: If it is not one, naming the field.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        shell = " Where '*' stands for any text, write '.*'." if "*" in pattern else ""
        raise ConfigError(f"{field} {quoted(pattern)} is not a regular expression: {error}.{shell}") from error


def is_risky(expression: str) -> bool:
    """Whether matching can take more than a time that is cubic in the length of a name.

    It cannot with at most two repetitions, none of them of a group, and few other choices.
    """
    choices = len(_OPTION.findall(expression)) + (expression.count("|") if "(" in expression else 0)
    repeats_much = len(_REPEAT.findall(expression)) > 2 or _REPEATED_GROUP.search(expression) is not None
    return repeats_much or choices > _MOST_CHOICES


def is_literal(pattern: str) -> bool:
    """Whether the key of a pattern map is a path, and no regular expression."""
    return _LITERAL.fullmatch(pattern) is not None


def exact_pattern(name: str) -> str:
    """Returns the key of a pattern map, such as `rank_pattern`, that names one layer in full, whatever it is called."""
    return name if is_literal(name) else f"^{exact_expression(name)}"


def exact_expression(name: str) -> str:
    """Returns a regular expression that matches one name and no other, whatever it is called."""
    return name.replace(".", r"\.") if is_literal(name) else re.escape(name)


def select(
    field: str, patterns: Sequence[str] | str, names: Iterable[str], hint: Callable[[str], str] | None = None
) -> dict[str, list[str]]:
    """Returns the names that each pattern of a field matches.

    Hints say what to write instead of a pattern that matches nothing; by default they are the nearest names.

    Raises:
        TargetError: If a pattern matches none of the names.
    """
    names = list(names)
    found = matches(field, patterns, names)
    for pattern, matched in found.items():
        if not matched:
            meant = hint(pattern) if hint else nearest(pattern, names)
            raise TargetError(f"{field}: {quoted(pattern)} matches no module of the model. {meant}")
    return found


def matches(field: str, patterns: Sequence[str] | str, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the names that each pattern of a `target_modules`-like field matches, in their order.

    An entry of a list that starts with `^` is a name in full; others are ends of names.
    """
    if isinstance(patterns, str):
        return {patterns: [*filter(compiled(field, patterns).fullmatch, names)]}
    by_end: dict[str, dict[str, None]] = {}  # so that a model of many layers may be given a list of as many names
    for name in names:
        for end in (*path_ends(name), f"^{name}"):
            by_end.setdefault(end, {})[name] = None
    at = {name: position for position, name in enumerate(names)}
    return {
        pattern: sorted({name for each in spellings(pattern) for name in by_end.get(each, ())}, key=at.__getitem__)
        for pattern in patterns
    }


def nearest(pattern: str, names: Iterable[str]) -> str:
    """Offers the path ends, as long as the pattern, that look most like it."""
    length = pattern.count(".") + 1
    return near(pattern, {".".join(name.split(".")[-length:]) for name in names if name})


def spellings(pattern: str) -> set[str]:
    """Returns a literal pattern as it is, and as it is where nothing is compiled."""
    return {pattern, plain_name(pattern)}
