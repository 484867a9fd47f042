"""Commands of the other distributions that own a script called `lightning`, such as lightning-sdk.

Two distributions may install a script of one name, and the one that was installed last has the file. If that is
ours, it hands over the commands that it does not know.
"""

from importlib import metadata

from lora_plugins.names import DISTRIBUTION


def run_foreign() -> int | None:
    """Runs the other owner's script on the process's arguments; returns its exit code, or None without an owner."""
    for point in metadata.entry_points(group="console_scripts", name="lightning"):
        if point.dist is not None and point.dist.name != DISTRIBUTION:
            result = point.load()()
            return result if isinstance(result, int) else 0
    return None
