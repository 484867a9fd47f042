"""The names of the splits, and splits that come out the same again: by sample name and seed, not by file order."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from hashlib import sha256
from typing import TypeVar

from lora_plugins import ConfigError

TRAIN, VAL, TEST = "train", "val", "test"

Sample = TypeVar("Sample")


def check_shares(val_share: float, test_share: float) -> None:
    """Checks that the shares leave something to train on.

    Raises:
        ConfigError: If they do not.
    """
    if val_share + test_share >= 1:
        raise ConfigError(f"val_share is {val_share} and test_share {test_share}; together they stay below 1.")


def leaves_one(samples: int, batch_size: int) -> bool:
    """Whether the last batch of several would be a single sample, which training leaves out, as norms need two."""
    return samples > batch_size and samples % batch_size == 1


def hold_out(
    samples: Mapping[str, Sequence[Sample]],
    shares: Mapping[str, float],
    *,
    seed: int,
    name: Callable[[Sample], str],
    stratum: Callable[[Sample], Hashable],
) -> dict[str, list[Sample]]:
    """Takes missing splits out of the train split, stratified; `shares` are parts of it.

    Each stratum (each class, say) gives its share, rounded, to every missing split. Within a stratum, samples are drawn
    in the order of a hash of their names and the seed, so a split is the same on every machine. Samples of one name, as
    an image that is listed twice, stay together.
    """
    missing = {split: share for split, share in shares.items() if share > 0 and split not in samples}
    strata: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in samples[TRAIN]:
        strata[stratum(sample)].append(sample)
    held_out: dict[str, str] = {}
    for members in strata.values():
        shuffled = sorted(members, key=lambda sample: sha256(f"{seed}:{name(sample)}".encode()).digest())
        start = 0
        for split, share in missing.items():
            end = start + round(share * len(members))
            held_out |= {name(sample): split for sample in shuffled[start:end]}
            start = end
    result = {split: list(members) for split, members in samples.items()}
    for split in (TRAIN, *missing):
        result[split] = [sample for sample in samples[TRAIN] if held_out.get(name(sample), TRAIN) == split]
    return {split: result[split] for split in (TRAIN, VAL, TEST) if split in result}
