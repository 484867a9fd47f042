"""Commands behind our own examples: `python -m lora_plugins.tasks compare`, and others."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from lora_plugins.errors import near

COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "compare": ("examples", "compare_main", "frozen backbone, LoRA and full fine-tuning on the embedded data"),
    "compare-dreambooth": ("examples", "compare_dreambooth_main", "the same for Dreambooth, with three seeds"),
    "pretrain": ("examples", "pretrain_main", "train the small backbones that are shipped"),
    "pretrain-diffusion": ("examples", "pretrain_diffusion_main", "train the text-to-image model that is shipped"),
}
"""By command: the room and the function that runs it, which is imported when it is asked for, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        room, function, _ = COMMANDS[given[0]]
        return int(getattr(import_module(f"lora_plugins.tasks.{room}"), function)(given[1:]))
    asked = given in (["--help"], ["-h"])
    print(_usage(given), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _usage(given: Sequence[str]) -> str:
    commands = "\n".join(f"  {name:20}{does}" for name, (_, _, does) in COMMANDS.items())
    usage = f"usage: python -m lora_plugins.tasks COMMAND [--help] ...\n\n{commands}"
    if not given or given[0].startswith("-"):
        return usage
    return f"{usage}\n\nerror: unknown command {given[0]!r}. {near(given[0], COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
