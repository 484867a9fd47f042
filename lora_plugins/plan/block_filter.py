"""The numbered blocks of a model, and the choice among them by `layers_to_transform` and `layers_pattern`."""

from collections import Counter
from collections.abc import Iterable, Sequence

from lora_plugins.errors import TargetError, listing, near
from lora_plugins.plan.patterns import spellings
from lora_plugins.utils import path_ends, path_runs

BLOCK_CONTAINERS = frozenset(
    {"layers", "layer", "h", "blocks", "block", "stages", "stage", "levels", "features", "resblocks"}
)
"""Names under which models keep their numbered blocks."""


class BlockFilter:
    """The choice of blocks by `layers_to_transform` and `layers_pattern`.

    Args:
        blocks: Indices of blocks, or paths of blocks.
        containers: The names of block containers that indices count in, or the ends of their paths; the usual ones when
            None.
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
        self._paths = {each for block in chosen if isinstance(block, str) for each in spellings(block)}
        self._containers = [containers] if isinstance(containers, str) else containers
        names = list(names)
        self._check_containers(names)
        self._check_blocks(chosen, names)

    def _check_containers(self, names: list[str]) -> None:
        numbered = {path for name in names for path, _ in _numbered(name)}
        for container in self._containers or ():
            if not any(container in path_ends(path) for path in numbered):
                held = {end for path in numbered for end in path_ends(path)[: container.count(".") + 1]}
                raise TargetError(
                    f"layers_pattern: {container!r} holds no numbered block with a target. {near(container, held)}"
                )

    def _check_blocks(self, chosen: list[int | str], names: list[str]) -> None:
        found = {block for name in names for block in self._blocks_of(name)}
        for block in chosen:
            if found.isdisjoint({block} if isinstance(block, int) else spellings(block)):
                raise TargetError(
                    f"layers_to_transform: there is no block {block!r} in "
                    f"{self._containers or 'the usual block containers'} that holds a target. "
                    f"Blocks with targets: {self._known(block, names)}."
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
        if len(found) > 1 and self._are_one(path for path, _ in found):
            longer = "" if self._containers is None else ", by a longer end of its path"
            raise TargetError(
                f"layers_to_transform: the number {self._numbers[0]} could count in {found[0][0]!r} or in "
                f"{found[1][0]!r} of {name!r}. Name blocks by their path instead, such as "
                f"'{found[1][0]}.{found[1][1]}', or choose the container with layers_pattern{longer}."
            )
        return paths | ({index for _, index in found} & {*self._numbers})

    def _are_one(self, containers: Iterable[str]) -> bool:
        """Whether a number could mean a block of any of nested containers, as no names choose, or one name has two."""
        if self._containers is None:
            return True
        ends = Counter(end for path in containers for end in path_ends(path))
        return any(ends[name] > 1 for name in self._containers)

    def _known(self, block: int | str, names: list[str]) -> str:
        numbered = {each for name in names for each in _numbered(name)}
        others = sorted({path_ends(path)[0] for path, _ in numbered})
        if isinstance(block, int):  # a path may lead through any container
            numbered = {each for name in names for each in _indices(name, self._containers or BLOCK_CONTAINERS)}
        paths = sorted(f"{path}.{index}" for path, index in numbered)
        return ", ".join(paths[:20]) or (
            f"none. Name a container in layers_pattern: {listing(others)}" if others else "none"
        )


def _indices(name: str, containers: Iterable[str]) -> list[tuple[str, int]]:
    """Returns the numbered blocks around a layer, as `_numbered` does, of some containers only."""
    return [each for each in _numbered(name) if not set(path_ends(each[0])).isdisjoint(containers)]


def _numbered(name: str) -> list[tuple[str, int]]:
    """Returns the numbered blocks around a layer: the path of the container, and the index in it."""
    parts = name.split(".")
    numbers = [at for at in range(1, len(parts)) if parts[at].isdecimal()]
    return [(".".join(parts[:at]), int(parts[at])) for at in numbers]
