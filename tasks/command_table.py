"""The table of commands, which the entry point `tasks` of the group `lora_plugins.commands` names.

The commands of Lightning are among them, so that two of them can be extended: `predict` and `export` of a path are the
tasks', with flags they are Lightning's. Arguments are parsed before what a command needs is imported.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from lora_plugins.cli import Command, importing
from lora_plugins.integrations.lightning.cli import COMMANDS as OF_LIGHTNING
from lora_plugins.integrations.lightning.cli import quiet
from lora_plugins.tasks.command_lines import (
    check_adapters,
    check_ending,
    check_model,
    check_runtime,
    export_parser,
    generate_parser,
    predict_parser,
    serve_parser,
)


def _predict(arguments: list[str]) -> int:
    parser, asked = predict_parser(), {"-h", "--help"} & {*arguments}
    first = "".join(arguments[1:2]).partition("=")[0]
    of_the_trainer = arguments[0].startswith("-") or (first.startswith("-") and first not in parser.flags)
    if of_the_trainer and not asked:
        return OF_LIGHTNING["predict"].run(arguments)
    given = parser.parse_args(arguments[1:])
    if _is_complete():
        check_model(given.model)
        _check_images(given.images)
    with importing():
        from lora_plugins.tasks.inference import predict_main

    with quiet():
        return predict_main(given)


def _check_images(images: Sequence[str]) -> None:
    from lora_plugins.tasks.files import named_images

    named_images(images)


def _is_complete() -> bool:
    """Whether everything that the commands need is installed; otherwise their imports say so first."""
    return all(map(find_spec, _NEEDS))


def _export(arguments: list[str]) -> int:
    if any(argument.partition("=")[0] == "--model" for argument in arguments):
        return OF_LIGHTNING["export"].run(arguments)
    given = export_parser().parse_args(arguments[1:])
    if _is_complete():
        check_ending(given.out)
        check_runtime(given.out)
        check_model(given.model)
    with importing():
        from lora_plugins.tasks.inference import export_main

    with quiet():
        return export_main(given)


def _report(arguments: list[str]) -> int:
    from lora_plugins.tasks.pages import report_main

    return report_main(arguments[1:])


def _generate(arguments: list[str]) -> int:
    given = generate_parser().parse_args(arguments[1:])
    with importing():
        from lora_plugins.tasks.diffusion import generate_main

    with quiet():
        return generate_main(given)


def _train(arguments: list[str]) -> int:
    from lora_plugins.tasks.autoconfig import train_main

    with quiet():
        return train_main(arguments[1:])


def _serve(arguments: list[str]) -> int:
    given = serve_parser().parse_args(arguments[1:])
    if _is_complete():
        check_adapters(given.adapters)
    with importing():
        from lora_plugins.tasks.serving import serve_main

    with quiet():
        return serve_main(given)


_OF_DIFFUSION = ("diffusers", "transformers", "lightning", "PIL", "torchvision")
_NEEDS = (
    *("lightning", "lightning_utilities", "jsonargparse", "rich", "yaml", "torchmetrics"),
    *("torchvision", "PIL", "timm", "transformers"),
)


def _command(run: Callable[[list[str]], int], summary: str, options_first: bool = False) -> Command:
    return Command(summary, run, _NEEDS, "lora-plugins[vision]", options_first)


COMMANDS: Mapping[str, Command] = {
    "train": _command(_train, "fine-tune on your images: train DATA"),
    **OF_LIGHTNING,
    "predict": _command(_predict, "write labels or masks: predict MODEL IMAGES", options_first=True),
    "export": _command(_export, "write a network for other runtimes: export MODEL OUT.onnx"),
    "serve": Command(
        "answer images over HTTP by many adapters on one base: serve ADAPTERS",
        _serve,
        (*_NEEDS, "fastapi", "uvicorn"),
        "lora-plugins[serve]",
    ),
    "report": Command("put the reports of runs side by side", _report, ("jinja2",), "lora-plugins[vision]"),
    "generate": Command(
        "draw pictures from a diffusion pipeline and adapters, a checkpoint or a merged pipeline",
        _generate,
        _OF_DIFFUSION,
        "lora-plugins[diffusion]",
    ),
}
