"""Reads the arguments of a command, and the configurations that they name, as the keys and values of one table."""

import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_plugins.errors import ConfigError, near
from lora_plugins.integrations.lightning.cli.yaml_texts import load_yaml, parsed_yaml

SECTIONS = (
    "config",
    "ckpt_path",
    "data",
    "help",
    "lora",
    "lora_callback",
    "lr_scheduler",
    "model",
    "optimizer",
    "print_config",
    "return_predictions",
    "seed_everything",
    "trainer",
    "verbose",
    "weights_only",
)
"""What flags begin with, and the keys of a configuration."""

_TABLES = frozenset({"data", "lora", "lora_callback", "lr_scheduler", "model", "optimizer", "trainer"})
"""Sections that hold keys with values, or are the path of a file with them or of a class."""

_COMMANDS = frozenset({"fit", "validate", "test", "predict"})
"""Below which a configuration may lie in a file."""

_TAKEN_WHOLE = frozenset({"init_options", "quantize_options", "rank_pattern", "alpha_pattern", "fused_parts"})
"""Tables that a later configuration replaces; it adds to others."""

_OF_A_CLASS = frozenset({"class_path", "init_args", "dict_kwargs", "help"})
"""What a section may hold that names a class."""

MISSING = object()


def read_arguments(arguments: Sequence[str], flags: Sequence[str], command: str) -> dict[str, Any]:
    """Returns what arguments after a command give, later ones over earlier ones; short flags are further near matches.

    Raises:
        ConfigError: Of a flag, a key or a file that does not exist, or cannot be read.
    """
    given: dict[str, Any] = {}
    for flag, value in _pairs(arguments):
        section = flag.lstrip("-").partition(".")[0].rstrip("+")
        if flag.startswith("--") and section not in SECTIONS:
            _refuse_flag(flag, flags)
        if value == "" and "." not in flag and section != "print_config":
            raise ConfigError(f"{flag} is empty, perhaps from a shell variable that is not set.")
        if flag in ("--config", "-c"):
            _merge(given, _configuration(value, command))
        elif section == "help" or flag.endswith(".help"):
            given["print_config"] = ""  # it prints and does nothing, too
        elif value is None and "." in flag:
            raise ConfigError(f"{flag} takes a value: {flag} VALUE.")
        elif value is not None or section == "print_config":
            keys, parsed = keys_of(flag), parsed_yaml(value or "")
            _put(given, keys, _added(value_at(given, *keys), parsed) if flag.endswith("+") else parsed)
    return given


def keys_of(flag: str) -> list[str]:
    """Returns the keys that a flag stands for, where the parser lets `init_args` of a model or its data be left out."""
    keys = flag.lstrip("-").rstrip("+").split(".")
    if keys[0] in ("model", "data") and len(keys) > 1 and keys[1] not in _OF_A_CLASS:
        keys.insert(1, "init_args")
    return keys


def value_at(given: Any, *keys: str) -> Any:
    """Returns the value below some keys; `MISSING` if there is none."""
    for key in keys:
        given = given.get(key, MISSING) if isinstance(given, Mapping) else MISSING
    return given


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields the flags with their values, if they have one.

    Raises:
        ConfigError: Of a value without a flag.
    """
    left = deque(arguments)
    while left:
        if not _is_flag(left[0]):
            raise ConfigError(_stray(left[0]))
        flag, equals, value = left.popleft().partition("=")
        if equals:
            yield flag, value
        elif left and not _is_flag(left[0]):
            yield flag, left.popleft()
        else:
            yield flag, None


def _stray(argument: str) -> str:
    if Path(argument).suffix in (".yaml", ".yml") or argument.startswith("recipe:"):
        return f"{argument!r} has no flag before it. A configuration is given by --config {argument}."
    return f"{argument!r} has no flag before it. Several values of one flag are a list: '[a, b]'."


def _is_flag(argument: str) -> bool:
    """Whether an argument is a flag, and no negative number."""
    return argument.startswith("-") and re.fullmatch(r"-(\d+\.?\d*|\.\d+)(e-?\d+)?", argument) is None


def _refuse_flag(flag: str, short: Sequence[str]) -> None:
    hint = near(flag.partition(".")[0], [*(f"--{section}" for section in SECTIONS), *short])
    raise ConfigError(
        f"There is no flag {flag}. {hint} Arguments of the model are --model.init_args.NAME, of its data "
        "--data.init_args.NAME, of the trainer --trainer.NAME, of LoRA --lora.NAME."
    )


def _configuration(value: str | None, command: str) -> dict[str, Any]:
    """Returns the configuration that a value of `--config` is, or that is in the file it names."""
    if value is None:
        raise ConfigError("--config takes a YAML file, or recipe:NAME for one that is shipped.")
    if "\n" in value and not os.path.isfile(value):  # the text of a configuration; names may hold all but NUL
        return _below_command(parsed, command) if isinstance(parsed := parsed_yaml(value), dict) else {}
    _check_file(value)
    try:
        loaded = load_yaml(Path(value).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise ConfigError(f"{value} is not YAML: {said}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{value} is not a configuration: it holds no keys, such as `model:` and `data:`.")
    loaded = _below_command(loaded, command)
    _check_sections(value, loaded)
    return {**loaded}


def _check_file(given: str) -> None:
    path = Path(given)
    if path.is_dir():
        raise ConfigError(f"--config is {given}, which is a folder. Name a YAML file.")
    if not path.is_file():
        beside = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = near(path.name, beside) if beside else f"There is no YAML file in {path.parent.absolute()}."
        raise ConfigError(
            f"There is no file {given}. {hint} `lora-plugins recipes` lists what is shipped: --config recipe:NAME."
        )


def _check_sections(file: str, loaded: Mapping[str, Any]) -> None:
    for key, section in loaded.items():
        if key not in SECTIONS:
            raise ConfigError(f"{file} has the key {key!r}. {near(str(key), SECTIONS)}")
        if key in _TABLES and section is not None and not isinstance(section, Mapping | str):
            raise ConfigError(f"{file}: {key} is {section!r}; it holds keys with values.")
        _check_classes(f"{file}: {key}", section)


def _check_classes(where: str, given: Any) -> None:
    """Checks the tables that name a class, of which the parser would quote all that is around them.

    Not what is in their `init_args`, where a class may take a table with keys of any names.
    """
    if isinstance(given, list):
        for number, each in enumerate(given):
            _check_classes(f"{where}[{number}]", each)
    elif isinstance(given, Mapping):
        path = given.get("class_path", "")
        if not isinstance(path, str):
            raise ConfigError(f"{where}.class_path is {path!r}; it is the path of a class: package.module.Class.")
        if "class_path" in given and not isinstance(given.get("init_args") or {}, Mapping):
            raise ConfigError(f"{where}.init_args is {given['init_args']!r}; it holds keys with values.")
        for key, each in given.items():
            if key not in ("init_args", "dict_kwargs"):
                _check_classes(f"{where}.{key}", each)


def _below_command(loaded: dict[str, Any], command: str) -> dict[str, Any]:
    if not _COMMANDS & loaded.keys():
        return loaded
    section = loaded.get(command)
    return section if isinstance(section, dict) else {}


def _merge(given: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(given.get(key), dict) and key not in _TAKEN_WHOLE:
            _merge(given[key], value)
        elif not (isinstance(value, Mapping) and _is_in_a_file(key, given)):
            given[key] = dict(value) if isinstance(value, Mapping) else value


def _put(given: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if _is_in_a_file(key, given):
            return
        if not isinstance(given.get(key), dict):
            given[key] = {}
        given = given[key]
    given[keys[-1]] = value


def _is_in_a_file(key: str, given: Mapping[str, Any]) -> bool:
    """Whether a key is the section `lora` as the path of a file, which the parser reads: a part of it is no config."""
    return key == "lora" and isinstance(given.get(key), str)


def _added(before: Any, value: Any) -> list[Any]:
    return [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]
