"""Matching of module names: whole path components, regular expressions, and blocks."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from lora_plugins.errors import ConfigError, TargetError, near, quoted
from lora_plugins.utils import path_ends, path_runs, plain_name

Value = TypeVar("Value")

_LITERAL = re.compile(r"[\w\-./:]+")

_REPEAT = re.compile(r"[*+}]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")

BLOCK_CONTAINERS = frozenset(
    {"layers", "layer", "h", "blocks", "block", "stages", "stage", "levels", "features", "resblocks"}
)
"""Names under which models keep their numbered blocks."""


def ends_with(pattern: str, name: str) -> bool:
    """Whether the last path components of `name` are those of `pattern`."""
    return any(f".{name}".endswith(f".{each}") for each in _spellings(pattern))


def shortest_ends(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """Returns the shortest path ends that match some names and none of the others; none where these do not exist.

    None of them begins with a number, but for names that are nothing else.

    Args:
        wanted: The names to match.
        names: All names, the wanted ones included.
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

    An expression that repeats at most twice, and no group, cannot.
    """
    return len(_REPEAT.findall(expression)) > 2 or _REPEATED_GROUP.search(expression) is not None


def exact_pattern(name: str) -> str:
    """Returns the key of a pattern map, such as `rank_pattern`, that names one layer in full, whatever it is called."""
    return name if _LITERAL.fullmatch(name) else f"^{exact_expression(name)}"


def exact_expression(name: str) -> str:
    """Returns a regular expression that matches one name and no other, whatever it is called."""
    return name.replace(".", r"\.") if _LITERAL.fullmatch(name) else re.escape(name)


def matcher(field: str, patterns: Sequence[str] | str) -> dict[str, Callable[[str], bool]]:
    """Returns a test of full names for each pattern of a `target_modules`-like field."""
    if isinstance(patterns, str):
        expression = compiled(field, patterns)
        return {patterns: lambda name: expression.fullmatch(name) is not None}
    return {pattern: _ends_with(pattern) for pattern in patterns}


def select(
    field: str, patterns: Sequence[str] | str, names: Iterable[str], hint: Callable[[str], str] | None = None
) -> dict[str, list[str]]:
    """Returns the names that each pattern of a field matches.

    Args:
        field: Name of the field, for errors.
        patterns: The patterns.
        names: The names there are.
        hint: Returns what to write instead of a pattern that matches nothing; by default the nearest names.

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
    """Returns the names that each pattern of a `target_modules`-like field matches, in their order."""
    if isinstance(patterns, str):
        return {pattern: [*filter(test, names)] for pattern, test in matcher(field, patterns).items()}
    by_end: dict[str, dict[str, None]] = {}  # so that a model of many layers may be given a list of as many names
    for name in names:
        for end in path_ends(name):
            by_end.setdefault(end, {})[name] = None
    at = {name: position for position, name in enumerate(names)}
    return {
        pattern: sorted({name for each in _spellings(pattern) for name in by_end.get(each, ())}, key=at.__getitem__)
        for pattern in patterns
    }


def nearest(pattern: str, names: Iterable[str]) -> str:
    """Offers the path ends, as long as the pattern, that look most like it."""
    length = pattern.count(".") + 1
    return near(pattern, {".".join(name.split(".")[-length:]) for name in names if name})


class PatternMap(Generic[Value]):
    """Values of single layers by pattern, such as `rank_pattern`.

    Args:
        field: Name of the field, for errors.
        values: The patterns and their values.
        names: The names of all adapted layers.
        at_end: Whether a path that ends the name of a layer means that layer alone, and not those below it.

    Raises:
        TargetError: If a pattern matches none of the names.
    """

    def __init__(self, field: str, values: Mapping[str, Value], names: Iterable[str], *, at_end: bool = False) -> None:
        self._field = field
        self._values = values
        names = list(names)
        ends = {end for name in names for end in path_ends(name)} if at_end else set()
        self._at_end: dict[str, list[str]] = {}
        self._inside: dict[str, list[str]] = {}
        self._expressions: dict[str, re.Pattern[str]] = {}
        for key in values:
            is_end = not ends.isdisjoint(_spellings(key))
            if is_end or _LITERAL.fullmatch(key):
                for each in _spellings(key):
                    (self._at_end if is_end else self._inside).setdefault(each, []).append(key)
            else:
                self._expressions[key] = compiled(field, key if key.startswith("^") else rf"(?:.*\.)?(?:{key})")
        matched = {key for name in names for key in self._keys(name)}
        for key in values:
            if key not in matched:
                raise TargetError(f"{field}: {key!r} matches none of the adapted layers. {nearest(key, names)}")

    def _keys(self, name: str) -> set[str]:
        """Returns the patterns that match a name."""
        found = {key for key, expression in self._expressions.items() if expression.fullmatch(name)}
        for index, parts in ((self._at_end, path_ends(name)), (self._inside, path_runs(name))):
            found.update(key for part in parts for key in index.get(part, ()))
        return found

    def get(self, names: Sequence[str], default: Value) -> Value:
        """Returns the value of the most specific pattern that matches a layer.

        Args:
            names: All names of the layer, which may stand in the model more than once.
            default: The value of a layer that no pattern matches.

        Raises:
            TargetError: If two patterns match equally well.
        """
        found = sorted((-_specificity(key), key) for key in {key for name in names for key in self._keys(name)})
        if not found:
            return default
        best = [key for specificity, key in found if specificity == found[0][0]]
        if len(best) > 1:
            raise TargetError(
                f"{self._field}: {best[0]!r} and {best[1]!r} match the layer {names[0]!r} equally well. "
                "Make one of them longer; the full name of the layer always wins."
            )
        return self._values[best[0]]


class BlockFilter:
    """The choice of blocks by `layers_to_transform` and `layers_pattern`.

    Args:
        blocks: Indices of blocks, or paths of blocks.
        containers: The names of block containers that indices count in; the usual ones when None.
        names: The names of all layers that could be adapted.

    Raises:
        TargetError: If a block or a container does not exist, or an index could mean blocks of two nested containers.
    """

    def __init__(
        self,
        blocks: Sequence[int | str] | int | str,
        containers: Sequence[str] | str | None,
        names: Iterable[str],
    ) -> None:
        chosen = [blocks] if isinstance(blocks, int | str) else list(blocks)
        self._numbers = [block for block in chosen if isinstance(block, int)]
        self._paths = {each for block in chosen if isinstance(block, str) for each in _spellings(block)}
        self._containers = [containers] if isinstance(containers, str) else containers
        names = list(names)
        numbered = {parts[at] for parts in (name.split(".") for name in names) for at in _numbered(parts)}
        for container in self._containers or ():
            if container not in numbered:
                raise TargetError(
                    f"layers_pattern: {container!r} holds no numbered block with a target. {near(container, numbered)}"
                )
        found = {block for name in names for block in self._blocks_of(name)}
        for block in chosen:
            if found.isdisjoint({block} if isinstance(block, int) else _spellings(block)):
                raise TargetError(
                    f"layers_to_transform: there is no block {block!r} in "
                    f"{self._containers or 'the usual block containers'} that holds a target. "
                    f"Blocks with targets: {self._known(names)}."
                )

    def __call__(self, name: str) -> bool:
        """Whether the layer called `name` is in one of the blocks."""
        return bool(self._blocks_of(name))

    def _blocks_of(self, name: str) -> set[int | str]:
        """Returns the numbers and paths, of those that were chosen, of the blocks that a layer is in."""
        paths: set[int | str] = {*self._paths.intersection(path_runs(name))}
        if not self._numbers:
            return paths
        found = _indices(name, self._containers or BLOCK_CONTAINERS)
        if self._containers is None and len(found) > 1:
            raise TargetError(
                f"layers_to_transform: the number {self._numbers[0]} could count in {found[0][0]!r} or in "
                f"{found[1][0]!r} of {name!r}. Name blocks by their path instead, such as "
                f"'{found[1][0]}.{found[1][1]}', or choose the container with layers_pattern."
            )
        return paths | ({index for _, index in found} & {*self._numbers})

    def _known(self, names: list[str]) -> str:
        containers = self._containers or BLOCK_CONTAINERS
        paths = sorted({f"{path}.{index}" for name in names for path, index in _indices(name, containers)})
        return ", ".join(paths[:20]) or "none"


def _ends_with(pattern: str) -> Callable[[str], bool]:
    return lambda name: ends_with(pattern, name)


def _spellings(pattern: str) -> set[str]:
    """Returns a literal pattern as it is, and as it is where nothing is compiled."""
    return {pattern, plain_name(pattern)}


def _specificity(key: str) -> int:
    """The number of path components of a literal key; 0 for a regular expression."""
    return key.count(".") + 1 if _LITERAL.fullmatch(key) else 0


def _indices(name: str, containers: Iterable[str]) -> list[tuple[str, int]]:
    """The numbered blocks that `name` lies in: the container's path, and the index in it."""
    parts = name.split(".")
    return [(".".join(parts[: at + 1]), int(parts[at + 1])) for at in _numbered(parts) if parts[at] in containers]


def _numbered(parts: Sequence[str]) -> list[int]:
    """Where a component of a name is followed by a number."""
    return [at for at in range(len(parts) - 1) if parts[at + 1].isdecimal()]
