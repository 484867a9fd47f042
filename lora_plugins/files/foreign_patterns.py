"""Tries the regular expressions of a file in a process of their own first: one may take practically forever."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence

from lora_plugins.config import LoraConfig
from lora_plugins.errors import AdapterFileError
from lora_plugins.plan import is_risky

_SECONDS = 10.0
"""How long all expressions of a config may take; a fair one takes less than a millisecond for each name."""

_PROGRAM = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for expression in expressions:
    for name in names:
        re.fullmatch(expression, name)
"""


def check_patterns(config: LoraConfig, names: Iterable[str]) -> None:
    """Checks that the expressions of a config that came with a file terminate on names; see `check_expressions`."""
    check_expressions(_expressions(config), names)


def check_expressions(expressions: Iterable[str], names: Iterable[str]) -> None:
    """Checks that regular expressions of a file, with which whole names are matched, terminate on these names.

    Matching cannot be stopped from within Python. Those that are not `is_risky` are not tried: their time is
    little more than cubic in the length of a name.

    Raises:
        AdapterFileError: If they do not within ten seconds.
    """
    risky = [expression for expression in expressions if is_risky(expression)]
    if not risky or not sys.executable:
        return
    given = json.dumps([risky, list(names)]).encode()
    try:
        # Without anything of the user's: no site packages, no environment. An error in an expression is reported later.
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=given,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterFileError(
            f"The regular expressions of the adapter's config take more than {_SECONDS:g} seconds on this model's "
            f"names: {', '.join(map(repr, risky))}. Have whoever made it save it with simpler ones."
        ) from error


def _expressions(config: LoraConfig) -> list[str]:
    patterns = [config.target_modules, config.exclude_modules]
    whole = [pattern for pattern in patterns if isinstance(pattern, str)]
    maps: Sequence[Iterable[str]] = (config.rank_pattern, config.alpha_pattern, config.fused_parts)
    return [*whole, *(f"(?:.*\\.)?(?:{key})" for keys in maps for key in keys)]
