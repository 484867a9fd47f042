"""The command `lora-plugins train DATA`."""

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_plugins.cli import without_collections
from lora_plugins.errors import ConfigError
from lora_plugins.integrations.lightning.cli import COMMANDS, recipe_path
from lora_plugins.tasks.autoconfig.arguments import parsed
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
from lora_plugins.tasks.autoconfig.recommended import AUTO, RECIPES, Recipe
from lora_plugins.tasks.autoconfig.run_folder import folders, held
from lora_plugins.tasks.autoconfig.survey import survey

EXAMPLE = "cls"
"""The recipe that runs without DATA."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ConfigError: If flags cannot be.
        DataError: If the data cannot be trained on.
        WeightsError: If there is no such file of weights.
    """
    given = parsed(arguments)
    _check_device(given.device)
    _check_started_once()
    weights = checked_weights(given.weights)
    tried = folders(given.out, None if given.data is None else Path(hub_name(given.data) or given.data).resolve())
    with without_collections():  # most of its time is imports; nothing is made for data that cannot be used
        flags = Flags(given.masks, given.classes, given.ignore_index, given.val_share)
        found = None if given.data is None else survey(given.data, flags)
    if given.plan:
        text = _configuration(given, arguments, found, weights, next(tried))
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder) / CONFIG, text)
            return COMMANDS["plan"].run(["plan", "--config", str(Path(folder) / CONFIG)])
    with held(tried) as out:
        _write(out / CONFIG, _configuration(given, arguments, found, weights, out))
        return _fit(out / CONFIG)


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
            f"train was started {processes} times (WORLD_SIZE), as by torchrun, but it sets up data, model and folder "
            "of one run. Let it write a configuration, `lora-plugins train ... --plan --save-config FILE`, and start "
            f"`python -m lora_plugins fit --config FILE` {processes} times."
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


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes texts such as 1e3 too, which are numbers to `fit`, as in YAML 1.2, and not to PyYAML."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


def _yaml(made: Mapping[str, Any], arguments: Sequence[str]) -> str:
    command = shlex.join(["lora-plugins", "train", *arguments])
    head = textwrap.fill(f"What `{command}` made. Run it again: lora-plugins fit --config FILE", 118)
    body: str = yaml.dump(dict(made), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return textwrap.indent(head, "# ") + "\n" + body


def _write(path: Path, text: str, flag: str = "--out DIR") -> None:
    from lora_plugins.utils import replace_file  # brings torch along

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            path.write_text(text, encoding="utf-8")
        else:
            replace_file(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}. Name another place: {flag}."
        ) from error
