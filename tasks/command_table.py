"""The table of commands, which the entry point `tasks` of the group `lora_plugins.commands` names."""

from collections.abc import Mapping

from lora_plugins.cli import Command


def _report(arguments: list[str]) -> int:
    from lora_plugins.tasks.pages import report_main

    return report_main(arguments[1:])


def _generate(arguments: list[str]) -> int:
    from lora_plugins.tasks.diffusion import generate_main

    return int(generate_main(arguments[1:]))


_OF_DIFFUSION = ("diffusers", "transformers", "lightning", "PIL", "torchvision")

COMMANDS: Mapping[str, Command] = {
    "generate": Command(
        "draw pictures from a diffusion pipeline and adapters, a checkpoint or a merged pipeline",
        _generate,
        _OF_DIFFUSION,
        "lora-plugins[diffusion]",
    ),
    "report": Command("put the reports of runs side by side", _report, ("jinja2",), "lora-plugins[vision]"),
}
