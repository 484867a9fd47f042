"""The Hugging Face hub when it cannot be reached: nothing waits for it."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

SECONDS = 5.0
"""In which the hub answers, or counts as out of reach."""


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, which the environment may forbid."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


@contextmanager
def cache_where_unreachable() -> Iterator[None]:
    """Loads from the cache alone inside the block if the hub cannot be reached.

    Its library asks six times for each file otherwise, half a minute, and prints each try.
    """
    from huggingface_hub import constants

    from lora_plugins.utils import ending  # which imports torch; the help of commands does not

    before = constants.HF_HUB_OFFLINE
    with ending(partial(setattr, constants, "HF_HUB_OFFLINE", before)):
        constants.HF_HUB_OFFLINE = not hub_answers()
        yield
