"""Matching of module names: whole path components, regular expressions, and blocks."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from lora_plugins.errors import ConfigError, TargetError, near
from lora_plugins.utils import plain_name

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


def contains(pattern: str, name: str) -> bool:
    """Whether the path components of `pattern` stand next to each other somewhere in `name`."""
    return any(f".{each}." in f".{name}." for each in _spellings(pattern))


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
            end = next((end for end in _ends(name) if not any(ends_with(end, other) for other in others)), None)
            if end is None:
                return []
            ends.append(end)
    return ends


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if start == 0 or not parts[start].isdigit():
            yield ".".join(parts[start:])


def compiled(field: str, pattern: str) -> re.Pattern[str]:
    """Compiles a regular expression.

    Raises:
        ConfigError: If it is not one, naming the field.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        shell = " Where '*' stands for any text, write '.*'." if "*" in pattern else ""
        raise ConfigError(f"{field} {pattern!r} is not a regular expression: {error}.{shell}") from error


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
    found = {pattern: [name for name in names if test(name)] for pattern, test in matcher(field, patterns).items()}
    for pattern, matches in found.items():
        if not matches:
            meant = hint(pattern) if hint else nearest(pattern, names)
            raise TargetError(f"{field}: {pattern!r} matches no module of the model. {meant}")
    return found


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
        self._tests = {
            key: _ends_with(key) if at_end and any(map(_ends_with(key), names)) else _key_test(field, key)
            for key in values
        }
        for key, test in self._tests.items():
            if not any(test(name) for name in names):
                raise TargetError(f"{field}: {key!r} matches none of the adapted layers. {nearest(key, names)}")

    def get(self, names: Sequence[str], default: Value) -> Value:
        """Returns the value of the most specific pattern that matches a layer.

        Args:
            names: All names of the layer, which may stand in the model more than once.
            default: The value of a layer that no pattern matches.

        Raises:
            TargetError: If two patterns match equally well.
        """
        matches = sorted((-_specificity(key), key) for key, test in self._tests.items() if any(map(test, names)))
        if not matches:
            return default
        best = [key for specificity, key in matches if specificity == matches[0][0]]
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
        self._blocks = [blocks] if isinstance(blocks, int | str) else list(blocks)
        self._containers = [containers] if isinstance(containers, str) else containers
        names = list(names)
        numbered = {parts[at] for parts in (name.split(".") for name in names) for at in _numbered(parts)}
        for container in self._containers or ():
            if container not in numbered:
                raise TargetError(
                    f"layers_pattern: {container!r} holds no numbered block with a target. {near(container, numbered)}"
                )
        for block in self._blocks:
            if not any(self._in_block(block, name) for name in names):
                raise TargetError(
                    f"layers_to_transform: there is no block {block!r} in "
                    f"{self._containers or 'the usual block containers'} that holds a target. "
                    f"Blocks with targets: {self._known(names)}."
                )

    def __call__(self, name: str) -> bool:
        """Whether the layer called `name` is in one of the blocks."""
        return any(self._in_block(block, name) for block in self._blocks)

    def _in_block(self, block: int | str, name: str) -> bool:
        if isinstance(block, str):
            return contains(block, name)
        found = _indices(name, self._containers or BLOCK_CONTAINERS)
        if self._containers is None and len(found) > 1:
            raise TargetError(
                f"layers_to_transform: the number {block} could count in {found[0][0]!r} or in {found[1][0]!r} of "
                f"{name!r}. Name blocks by their path instead, such as '{found[1][0]}.{found[1][1]}', or choose the "
                "container with layers_pattern."
            )
        return any(index == block for _, index in found)

    def _known(self, names: list[str]) -> str:
        containers = self._containers or BLOCK_CONTAINERS
        paths = sorted({f"{path}.{index}" for name in names for path, index in _indices(name, containers)})
        return ", ".join(paths[:20]) or "none"


def _ends_with(pattern: str) -> Callable[[str], bool]:
    return lambda name: ends_with(pattern, name)


def _key_test(field: str, key: str) -> Callable[[str], bool]:
    if _LITERAL.fullmatch(key):
        return lambda name: contains(key, name)
    expression = compiled(field, rf"(?:.*\.)?(?:{key})" if not key.startswith("^") else key)
    return lambda name: expression.fullmatch(name) is not None


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
