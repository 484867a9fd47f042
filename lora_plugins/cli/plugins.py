"""`lora-plugins plugins`: every plugin with its distribution, version, what it provides, and its state."""

from argparse import Namespace

from lora_plugins.cli.text import table
from lora_plugins.errors import PluginError
from lora_plugins.plugins import PluginInfo, Registry, found_plugins


def run(_: Namespace) -> int:
    """Prints all plugins.

    Raises:
        PluginError: If two plugins claim one name or module class, naming all that do, after the table; or a file that
            was asked for fails.
    """
    print("Plugins of lora_plugins\n")
    registry, clashes = found_plugins()
    print(listed(registry))
    if clashes:
        raise PluginError("\n".join(clashes))
    return 0


def listed(registry: Registry) -> str:
    """Returns the table of all plugins of a registry."""
    heading = ("plugin", "distribution", "version", "provides", "state")
    return table([heading, *(line for info in registry.plugins for line in _lines(info))])


def _lines(info: PluginInfo) -> list[tuple[str, str, str, str, str]]:
    """Returns the lines of one plugin, one for each thing that it provides."""
    provided = [f"{title} {name}" for title, name in info.provides] or ["-"]
    state = " ".join(info.state.split())  # an error's message may have several lines
    first = (info.name, info.distribution, info.version, provided[0], state)
    return [first, *(("", "", "", what, "") for what in provided[1:])]
