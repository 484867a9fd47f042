"""The command `lora-plugins train DATA`."""

import argparse
import json
import os
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lora_plugins.cli import Parser, without_collections
from lora_plugins.errors import ConfigError
from lora_plugins.integrations.lightning.cli import COMMANDS, SHORT, positive, recipe_path, whole
from lora_plugins.tasks.autoconfig.configuration import (
    CONFIG,
    TASKS,
    Settings,
    batch_size,
    configuration,
    described,
    device_of,
    lora_fields,
)
from lora_plugins.tasks.autoconfig.found import Flags, Survey
from lora_plugins.tasks.autoconfig.hub_survey import hub_name
from lora_plugins.tasks.autoconfig.model_choice import Choice, checked_weights, choose_model
from lora_plugins.tasks.autoconfig.recommended import AUTO, PLAIN, RECIPES, Recipe
from lora_plugins.tasks.autoconfig.run_folder import folders, held
from lora_plugins.tasks.autoconfig.survey import survey

EXAMPLE = "cls"
"""The recipe that runs without DATA."""

_OF_FIT = f"That is one of fit: lora-plugins fit --config runs/NAME/{CONFIG}, which each run leaves."
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("--config", "-c"), _OF_FIT),
    **dict.fromkeys(
        ("--resume", "--ckpt_path", "--ckpt-path", "--checkpoint"),
        f"A run goes on with: lora-plugins fit --config runs/NAME/{CONFIG} --ckpt_path CHECKPOINT.",
    ),
    **dict.fromkeys(("--lora.r", "--r", "-r", "--lora-rank", "--lora_r"), "It is --rank here."),
    **dict.fromkeys(
        ("--task", "--type"), "Folders of classes are classified, images with masks (--masks DIR) are segmented."
    ),
    **dict.fromkeys(("--num-classes", "--num_classes"), "They are counted; --classes names those of masks."),
    **dict.fromkeys(("--data", "--root", "--train", "--dataset"), "Write it without a flag: lora-plugins train DATA."),
    **dict.fromkeys(("--imgsz", "--size", "--img-size", "--image_size"), "It is --image-size here."),
    **dict.fromkeys(("--batch", "--bs", "--batch_size"), "It is --batch-size here."),
    **dict.fromkeys(("--learning-rate", "--learning_rate", "--lr0"), "It is --lr here."),
    **dict.fromkeys(("--name", "--project", "--output", "--output-dir", "--output_dir", "-o"), "It is --out here."),
    **dict.fromkeys(
        ("--target-modules", "--target_modules", "--lora-alpha", "--alpha", "--optimizer", "--loss", "--augmentation"),
        "Write the configuration (--save-config FILE), change it there, and run: lora-plugins fit --config FILE.",
    ),
}
"""What to write here, by flags of `fit` and of other programs."""

DEVICES = ("auto", "cpu", "cuda", "mps")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ConfigError: If flags cannot be.
        DataError: If the data cannot be trained on.
        WeightsError: If there is no such file of weights.
    """
    given = _parser().parse_args(arguments)
    if given.data == "":  # which a path takes for the current folder
        raise ConfigError("DATA is empty, as a variable of the shell is that was not set. Name a folder or a list.")
    _check_device(given.device)
    _check_started_once()
    weights = checked_weights(given.weights)
    tried = folders(given.out, None if given.data is None else Path(hub_name(given.data) or given.data).resolve())
    with without_collections():  # most of its time is imports; nothing is made for data that cannot be used
        found = None if given.data is None else survey(given.data, _flags(given))
    if given.plan:
        text = _configuration(given, arguments, found, weights, next(tried))
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder) / CONFIG, text)
            return COMMANDS["plan"].run(["plan", "--config", str(Path(folder) / CONFIG)])
    with held(tried) as out:
        _write(out / CONFIG, _configuration(given, arguments, found, weights, out))
        return _fit(out / CONFIG)


def _flags(given: argparse.Namespace) -> Flags:
    return Flags(given.masks, given.classes, given.ignore_index, given.val_share)


def _configuration(
    given: argparse.Namespace, arguments: Sequence[str], found: Survey | None, weights: str | None, out: Path
) -> str:
    """Returns the configuration of a run, and prints what was found; writes it to a file if a flag names one."""
    with without_collections():
        made, lines = (_example(given, out), []) if found is None else _inferred(given, found, weights, out)
    print(_table(given.data, lines), flush=True)
    text = _yaml(made, arguments)
    if given.save_config is not None:
        _write(given.save_config, text, "--save-config FILE")
        print(f"Configuration: {given.save_config}")
    return text


def _fit(config: Path) -> int:
    """Runs `fit`; so do the processes that Lightning starts for further devices by the arguments of this one."""
    arguments = ["fit", "--config", str(config)]
    given, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        return COMMANDS["fit"].run(arguments)
    finally:
        sys.argv = given


def _inferred(
    given: argparse.Namespace, found: Survey, weights: str | None, out: Path
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """The configuration for the given data, and what to print about it."""
    choice = choose_model(found.task, given.model, weights, given.image_size)
    name = given.recipe or AUTO
    recipe = RECIPES[name][found.task]
    batch = _batch_size(given, found, choice, recipe)
    settings = Settings(
        given.epochs, given.rank, given.lr, batch, given.image_size, given.device, given.seed or 0, name
    )
    made = configuration(found, choice, settings, out)
    return made, described(found, choice, recipe, made)


def _parser() -> Parser:
    parser = Parser(
        prog="lora-plugins train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lora-plugins train [DATA] [flags]",
        elsewhere=ELSEWHERE,
        description="Fine-tune a model with LoRA on your images. What is not said is inferred, and printed first.",
        epilog="Without DATA, handwritten digits that come along are learned, as a first try.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="a folder of images for each class; or images/ and masks/; or a .csv or .jsonl list with columns image, "
        "label or mask; or hf://datasets/OWNER/NAME",
    )
    data.add_argument("--masks", type=_place, metavar="DIR", help="the folder of masks, PNG files named as the images")
    data.add_argument("--classes", type=_names, metavar="A,B,...", help="of masks: names of the classes, in order")
    data.add_argument("--ignore-index", type=_index, metavar="N", help="of masks: the value that stands for no class")
    data.add_argument("--val-share", type=_share, metavar="X", help="held out, if there is no val folder (0.2)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="timm/NAME, transformers/OWNER/NAME, smp/Unet:resnet18, ...")
    model.add_argument("--weights", metavar="FILE", help="its weights, .safetensors or .pth, if no hub is to be asked")
    model.add_argument("--image-size", type=_size, metavar="N", help="N, or HEIGHTxWIDTH")
    training = parser.add_argument_group("training")
    for flag, short in SHORT.items():
        training.add_argument(flag, type=short.takes, metavar=short.metavar, help=short.meaning)
    training.add_argument(
        "--recipe",
        type=_recipe,
        choices=RECIPES,
        metavar="NAME",
        help=f"{AUTO}, settings that were tried; {PLAIN}, LoRA's own",
    )
    training.add_argument("--device", choices=DEVICES, default="auto", metavar="NAME", help=", ".join(DEVICES))
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=_place, metavar="DIR", help="where they are left (runs/NAME)")
    out.add_argument("--save-config", type=_place, metavar="FILE", help="write the configuration there too")
    out.add_argument("--plan", action="store_true", help="print what would be adapted, and train nothing")
    return parser


def _place(text: str) -> Path:
    if not text:  # which a path takes for the current folder
        raise argparse.ArgumentTypeError("it is empty, as a variable of the shell is that was not set")
    return Path(text)


def _share(text: str) -> float:
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, from 0 to 1")
    return value


def _size(text: str) -> tuple[int, int]:
    height, *rest = text.split("x", 1)
    try:
        return whole(height), whole(rest[0] if rest else height)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels. Write N, or HEIGHTxWIDTH") from error


def _index(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no value of a mask, such as 255") from error


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(names) < 2 or len({*names}) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} are not two or more different names with commas between")
    return names


def _recipe(text: str) -> str:
    """A recipe of `train`; the shipped configurations of `fit` are called so too."""
    if text not in RECIPES:
        with suppress(ConfigError):
            recipe_path(text)
            raise argparse.ArgumentTypeError(
                f"{text!r} is a configuration of fit: lora-plugins fit --config recipe:{text}. It is {AUTO} or {PLAIN} "
                "here"
            )
    return text


def _check_device(device: str) -> None:
    if device in ("auto", "cpu"):
        return
    from lora_plugins.devices import usable_device

    usable_device(device, "--device")


def _check_started_once() -> None:
    """Refuses a launcher of several processes, each of which would choose a folder and train for itself."""
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes != "1":
        raise ConfigError(
            f"train was started {processes} times (WORLD_SIZE), as by torchrun, and chooses data, model and folder of "
            "one run. Let it write them down, `lora-plugins train ... --plan --save-config FILE`, and start `python -m "
            "lora_plugins fit --config FILE` as often."
        )


def _example(given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The configuration of the embedded example."""
    data = ("masks", "classes", "ignore_index", "val_share", "model", "weights", "image_size", "recipe")
    wrong = [name for name in data if getattr(given, name) is not None]
    if wrong:
        raise ConfigError(f"--{wrong[0].replace('_', '-')} is given, and no DATA: lora-plugins train DATA [flags].")
    recipe = json.dumps(yaml.safe_load(recipe_path(EXAMPLE).read_text(encoding="utf-8")))
    place = json.dumps(str(out))[1:-1]  # the inside of a text, whatever is in the name
    made: dict[str, Any] = json.loads(recipe.replace(f"runs/{EXAMPLE}", place))
    made["seed_everything"] = given.seed or 0
    made["trainer"] |= {"accelerator": given.device} | ({"max_epochs": given.epochs} if given.epochs else {})
    made["model"]["init_args"] |= {"lr": given.lr} if given.lr else {}
    made["data"]["init_args"] |= {"batch_size": given.batch_size} if given.batch_size else {}
    made["lora"] |= {"r": given.rank} if given.rank else {}
    return made


def _batch_size(given: argparse.Namespace, found: Survey, choice: Choice, recipe: Recipe) -> int:
    """The batch size: that of a flag, or else what fits; a step is tried in any case."""
    from lora_plugins.tasks.autoconfig.step_memory import fitting_batch, free_bytes, kept_bytes

    model = {**choice.arguments, "num_classes": len(found.classes)}
    size = given.image_size or found.size or choice.size
    per_image = kept_bytes(TASKS[found.task], model, size, lora_fields(recipe, given.rank))
    if given.batch_size is not None:
        return int(given.batch_size)
    wanted = batch_size(found, recipe)
    fitting = fitting_batch(wanted, per_image, free_bytes(device_of(given.device)))
    if fitting < wanted:
        print(f"Steps of {fitting} images, not {wanted}: one takes {per_image / 2**20:,.0f} MiB of memory.")
    return fitting


def _table(data: str | None, lines: Sequence[tuple[str, str, str]]) -> str:
    if data is None:
        return "No DATA is given: this learns handwritten digits that come along (recipe:cls)."
    rows = [f"  {about:10}{what}  [{flags}]" for about, what, flags in lines]
    return "\n".join([f"Found in {data}, each with the flags that overrule it:", *rows])


def _yaml(made: Mapping[str, Any], arguments: Sequence[str]) -> str:
    command = shlex.join(["lora-plugins", "train", *arguments])
    head = textwrap.fill(f"What `{command}` made. Run it again: lora-plugins fit --config FILE", 118)
    body: str = yaml.safe_dump(dict(made), sort_keys=False, allow_unicode=True)
    return textwrap.indent(head, "# ") + "\n" + body


def _write(path: Path, text: str, flag: str = "--out DIR") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}. Name another place: {flag}."
        ) from error
