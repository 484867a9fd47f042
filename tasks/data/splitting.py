"""Splits that can be made again: which sample goes where depends on its name and a seed, not on the order of files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from hashlib import sha256
from typing import TypeVar

from lora_plugins import ConfigError
from lora_plugins.tasks.data.vision_module import TEST, TRAIN, VAL

Item = TypeVar("Item")


def check_shares(val_share: float, test_share: float) -> None:
    """Refuse shares that leave nothing to train on.

    Raises:
        ConfigError: As said.
    """
    if val_share < 0 or test_share < 0 or val_share + test_share >= 1:
        raise ConfigError(f"val_share is {val_share} and test_share {test_share}; together they stay below 1.")


def split_off(
    items: Mapping[str, Sequence[Item]],
    shares: Mapping[str, float],
    *,
    seed: int,
    name: Callable[[Item], str],
    stratum: Callable[[Item], Hashable],
) -> dict[str, list[Item]]:
    """Take the splits that are not there yet out of the train split.

    Each stratum (each class, say) gives its share, rounded, to every split; within it samples are drawn in the order of
    a hash of their names and the seed. So a split is the same again on any machine.

    Args:
        items: Samples by split.
        shares: The share of the train split that each missing split takes.
        seed: Which of the many possible splits.
        name: The name of a sample, unique among them.
        stratum: What samples are divided evenly by.
    """
    wanted = {split: share for split, share in shares.items() if share > 0 and split not in items}
    strata: dict[Hashable, list[Item]] = defaultdict(list)
    for item in items[TRAIN]:
        strata[stratum(item)].append(item)
    taken: dict[int, str] = {}
    for members in strata.values():
        drawn = sorted(members, key=lambda item: sha256(f"{seed}:{name(item)}".encode()).digest())
        start = 0
        for split, share in wanted.items():
            end = start + round(share * len(members))
            taken |= {id(item): split for item in drawn[start:end]}
            start = end
    result = {split: list(found) for split, found in items.items()}
    for split in (TRAIN, *wanted):
        result[split] = [item for item in items[TRAIN] if taken.get(id(item), TRAIN) == split]
    return {split: result[split] for split in (TRAIN, VAL, TEST) if split in result}
