"""Arguments that tasks no longer have, and that files of earlier versions still hold."""

from collections.abc import Mapping
from types import MappingProxyType

from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins import ConfigError

REPLACEMENTS: Mapping[str, str] = MappingProxyType(
    {
        "optimizer_options": "`optimizer`, such as functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)",
        "schedule": "`lr_scheduler`, such as torch.optim.lr_scheduler.CosineAnnealingLR",
        "warmup": "`lr_scheduler`, such as lora_plugins.tasks.warmup_cosine",
    }
)
"""By argument of earlier versions: what replaces it."""


def is_earlier_file(optimizer: object, retired: Mapping[str, object]) -> bool:
    """Whether the arguments are those of a file of an earlier version, which has all of them; they are dropped.

    Raises:
        ConfigError: If some of them are given by hand, with their replacement.
        TypeError: For any other unknown argument.
    """
    for name in retired:
        if name not in REPLACEMENTS:
            raise TypeError(f"A task got an unexpected keyword argument {name!r}.")
    if retired.keys() == REPLACEMENTS.keys() and isinstance(optimizer, str):
        rank_zero_warn(
            f"A file of an earlier version: its hyperparameters optimizer, {', '.join(REPLACEMENTS)} are dropped. They "
            "matter for training only; give `optimizer` and `lr_scheduler` to train on."
        )
        return True
    if retired:
        name = next(iter(retired))
        raise ConfigError(f"A task has no argument {name!r} any more. Use {REPLACEMENTS[name]}.")
    return False
