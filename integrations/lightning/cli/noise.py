"""Silences what libraries print in every run, and what nobody can do anything about."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lora_plugins.cli import plain_warnings

LINES = (
    r"^Seed set to ",
    r"^GPU available: False",
    r"^TPU available: ",
    r"^Loading `train_dataloader` to estimate",
    r"^`Trainer\.fit` stopped: `max_epochs=",
    r"Tip: For seamless",
    r"^\W*Using \d+bit Automatic Mixed Precision",
)
"""Beginnings of lines that Lightning logs; the console says the same, or they say nothing."""

WARNED_LINES = (r"register_constant\(\) on Enum", r"^Failed to load .*torchao")
"""Of lines that are logged as warnings: what torchao says when it is imported, by whatever library."""

WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6.6 calls an old name of torch 2.13
    r".*does not have many workers",
    r".*smaller than the logging interval",
    r"LightningCLI's args parameter",  # those that it was given are those of the process
    r".*Checkpoint directory .* exists and is not empty",
    r".*does not contain any matching `on_step`",
)
"""Beginnings of warnings about what is so on purpose, or is nothing that a user can change."""

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "torch.utils._pytree",
    "torchao",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Drops these lines and warnings, and prints other warnings in one line each."""
    said, warned = (re.compile("|".join(patterns)) for patterns in (LINES, WARNED_LINES))

    def is_news(record: logging.LogRecord) -> bool:
        known = said if record.levelno <= logging.INFO else warned
        return known.search(record.getMessage()) is None

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        with warnings.catch_warnings(), plain_warnings():
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)
