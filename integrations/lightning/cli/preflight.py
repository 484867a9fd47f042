"""Looks through the arguments of a command before what takes seconds is imported: most mistakes are in them.

What is found here is answered at once. Everything else is found by LightningCLI, after its imports, and said by
`explained`.
"""

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.errors import near, no_folder
from lora_plugins.integrations.lightning.cli.short_flags import LARGEST_SEED
from lora_plugins.writable import check_writable_file, check_writable_folder

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

_OF_CHECKPOINTS = frozenset({"best", "last", "hpc"})
_OTHER_FILES = frozenset(
    {".safetensors", ".png", ".jpg", ".jpeg", ".yaml", ".yml", ".json", ".onnx", ".pt2", ".py", ".sh"}
)
_IN_SHARDED = (".metadata", "meta.pt", "checkpoint", "latest")
"""Of a checkpoint that is a folder: what torch's distributed checkpoints, Lightning and DeepSpeed write into one."""

_OF_A_FOLDER = "FolderDataModule"
"""How the names of the data modules end that read a folder of the user's, `root`."""

_TAKEN_WHOLE = frozenset({"init_options", "quantize_options", "rank_pattern", "alpha_pattern", "fused_parts"})
"""Tables that a later configuration replaces; it adds to others."""

_MISSING = object()


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # of a package without types
    """Reads 1e-3 and 1.5e3 as numbers, as jsonargparse does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


def check(
    arguments: Sequence[str], flags: Sequence[str] = (), *, command: str = "fit", writes: bool = False
) -> LoraConfig | None:
    """Checks what can be checked without Lightning.

    Args:
        arguments: Those of `fit` and the like, after the command's name.
        flags: Short flags, as further near matches.
        command: The command; a file may hold the configurations of several.
        writes: Whether the command writes what the configuration names.

    Returns:
        The section `lora:`; None if there is none, or it is to be read elsewhere.

    Raises:
        ConfigError: Of the first mistake, with the flag or key that it is in.
    """
    given: dict[str, Any] = {}
    for flag, value in _pairs(arguments):
        section = flag.lstrip("-").partition(".")[0].rstrip("+")
        if flag.startswith("--") and section not in SECTIONS:
            _refuse_flag(flag, flags)
        if flag in ("--config", "-c"):
            _merge(given, _configuration(value, command))
        elif flag.endswith(".help"):
            given["print_config"] = ""  # it prints and does nothing, too
        elif value is not None or section == "print_config":
            keys, parsed = flag.lstrip("-").rstrip("+").split("."), _parsed(value or "")
            _put(given, keys, _added(_get(given, *keys), parsed) if flag.endswith("+") else parsed)
    for one in (*_CHECKS, *(_CHECKS_OF_WRITING if writes else ())):
        one(given)
    return _lora_of(given)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields the flags with their values, if they have one."""
    waiting: str | None = None
    for argument in arguments:
        is_flag = argument.startswith("-") and not _is_number(argument)
        if not is_flag and waiting is not None:
            yield waiting, argument
            waiting = None
            continue
        if waiting is not None:
            yield waiting, None
            waiting = None
        if is_flag:
            flag, equals, value = argument.partition("=")
            if equals:
                yield flag, value
            else:
                waiting = flag
    if waiting is not None:
        yield waiting, None


def _is_number(argument: str) -> bool:
    return re.fullmatch(r"-\d+(\.\d*)?(e-?\d+)?", argument) is not None


def _refuse_flag(flag: str, short: Sequence[str]) -> None:
    hint = near(flag.partition(".")[0], [*(f"--{section}" for section in SECTIONS), *short])
    raise ConfigError(
        f"There is no flag {flag}. {hint} Arguments of the model are --model.init_args.NAME, of its data "
        "--data.init_args.NAME, of the trainer --trainer.NAME, of LoRA --lora.NAME."
    )


def _configuration(value: str | None, command: str) -> dict[str, Any]:
    if value is None:
        raise ConfigError("--config takes a YAML file, or recipe:NAME for one that is shipped.")
    if "\n" in value:  # the text of a configuration
        return _below_command(parsed, command) if isinstance(parsed := _parsed(value), dict) else {}
    path = Path(value)
    if path.is_dir():
        raise ConfigError(f"--config is {value}, which is a folder. Name a YAML file.")
    if not path.is_file():
        beside = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = near(path.name, beside) if beside else f"There is no YAML file in {path.parent.absolute()}."
        raise ConfigError(
            f"There is no file {value}. {hint} `lora-plugins recipes` lists what is shipped: --config recipe:NAME."
        )
    try:
        loaded: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise ConfigError(f"{value} is not YAML: {said}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{value} is not a configuration: it holds no keys, such as `model:` and `data:`.")
    loaded = _below_command(loaded, command)
    for key, section in loaded.items():
        if key not in SECTIONS:
            raise ConfigError(f"{value} has the key {key!r}. {near(str(key), SECTIONS)}")
        if key in _TABLES and section is not None and not isinstance(section, Mapping | str):
            raise ConfigError(f"{value}: {key} is {section!r}; it holds keys with values.")
    return {**loaded}


def _below_command(loaded: dict[str, Any], command: str) -> dict[str, Any]:
    if not _COMMANDS & loaded.keys():
        return loaded
    section = loaded.get(command)
    return section if isinstance(section, dict) else {}


def _parsed(value: str) -> Any:
    try:
        return yaml.load(value, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return value


def _merge(given: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(given.get(key), dict) and key not in _TAKEN_WHOLE:
            _merge(given[key], value)
        else:
            given[key] = dict(value) if isinstance(value, Mapping) else value


def _put(given: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(given.get(key), dict):
            given[key] = {}
        given = given[key]
    given[keys[-1]] = value


def _added(before: Any, value: Any) -> list[Any]:
    return [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]


def _get(given: Any, *keys: str) -> Any:
    for key in keys:
        given = given.get(key, _MISSING) if isinstance(given, Mapping) else _MISSING
    return given


def _check_model(given: Mapping[str, Any]) -> None:
    if "model" not in given and "print_config" not in given:
        raise ConfigError("the configuration has no `model:`, and needs it.")


def _lora_of(given: Mapping[str, Any]) -> LoraConfig | None:
    fields = given.get("lora")
    if not isinstance(fields, Mapping) or "class_path" in fields:
        return None
    try:
        return LoraConfig(**fields)
    except TypeError as error:
        raise ConfigError(f"lora: {error}") from error


def _check_classes(given: Mapping[str, Any]) -> None:
    for where, path in _class_paths(given, ""):
        package, _, name = path.rpartition(".")
        if package in LISTED and name not in (names := importlib.import_module(package).__all__):
            raise ConfigError(f"{where} is {path!r}, and {package} has no {name!r}. {near(name, names)}")


LISTED = ("lora_plugins", "lora_plugins.tasks", "lora_plugins.integrations.lightning")
"""Packages that list their names, and import what is behind them only when it is used."""


def _class_paths(given: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(given, Mapping):
        for key, value in given.items():
            inside = f"{where}.{key}".lstrip(".")
            if key == "class_path" and isinstance(value, str):
                yield inside, value
            yield from _class_paths(value, inside)
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from _class_paths(value, f"{where}[{number}]")


def _check_checkpoint(given: Mapping[str, Any]) -> None:
    path = given.get("ckpt_path")
    if not isinstance(path, str) or path in _OF_CHECKPOINTS or "://" in path or path.startswith("registry"):
        return
    if not Path(path).exists():
        folder = Path(path).parent
        beside = [each.name for each in folder.glob("*.ckpt")] if folder.is_dir() else []
        hint = near(Path(path).name, beside) if beside else f"There is no checkpoint in {folder.absolute()}."
        raise ConfigError(f"ckpt_path: there is no file {path}. {hint}")
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in _IN_SHARDED):
        raise ConfigError(f"ckpt_path: {path} is a folder without a checkpoint in it. Name a .ckpt file.")
    if Path(path).suffix in _OTHER_FILES:
        raise ConfigError(
            f"ckpt_path: {path} is not a checkpoint of Lightning. A run goes on from a .ckpt file; weights of a model "
            "are an argument of the model."
        )


def _check_accelerator(given: Mapping[str, Any]) -> None:
    wanted = _get(given, "trainer", "accelerator")
    if wanted not in ("gpu", "cuda"):
        return
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise ConfigError(f"trainer.accelerator is {wanted!r}, and torch finds no GPU here. Write 'auto' or 'cpu'.")


def _check_batch_size(given: Mapping[str, Any]) -> None:
    size = _get(given, "data", "init_args", "batch_size")
    if size is not _MISSING and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ConfigError(f"data.init_args.batch_size is {size!r}; it is a whole number, at least 1.")


def _check_seed(given: Mapping[str, Any]) -> None:
    seed = given.get("seed_everything", True)
    if seed is not None and not (isinstance(seed, int) and 0 <= seed <= LARGEST_SEED):
        raise ConfigError(
            f"seed_everything is {seed!r}; it is a whole number from 0 to {LARGEST_SEED}, or true for a random one."
        )


def _check_root(given: Mapping[str, Any]) -> None:
    root = _get(given, "data", "init_args", "root")
    if "print_config" in given or not str(_get(given, "data", "class_path")).endswith(_OF_A_FOLDER):
        return  # it is not read, or made first
    if isinstance(root, str) and not Path(root).is_dir():
        raise ConfigError(f"data.init_args.root: {no_folder(Path(root))}")


def _check_adapter_places(given: Mapping[str, Any]) -> None:
    named = _get(given, "lora_callback", "save_adapter_to")
    for entry in named if isinstance(named, list) else [named]:
        if isinstance(entry, str):
            check_writable_folder(Path(entry), "lora_callback.save_adapter_to")


def _check_export_place(given: Mapping[str, Any]) -> None:
    named, setting = _get(given, "lora_callback", "export_to"), "lora_callback.export_to"
    if not isinstance(named, str):
        return
    check_writable_file(Path(named), setting)
    if Path(named).exists() and Path(named).resolve() in {Path(path).resolve() for path in _texts(given.get("model"))}:
        raise ConfigError(f"{setting} is {named}, which the model is read from: it would be replaced. Name a new file.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(each)


def _check_other_places(given: Mapping[str, Any]) -> None:
    root, callbacks = _get(given, "trainer", "default_root_dir"), _get(given, "trainer", "callbacks")
    if isinstance(root, str) and "://" not in root:
        check_writable_folder(Path(root), "trainer.default_root_dir")
    for number, callback in enumerate(callbacks if isinstance(callbacks, list) else ()):
        path = _get(callback, "init_args", "path")
        if str(_get(callback, "class_path")).startswith("lora_plugins.") and isinstance(path, str):
            check_writable_file(Path(path), f"trainer.callbacks[{number}].init_args.path")


def _check_trainer(given: Mapping[str, Any]) -> None:
    options, known = given.get("trainer"), _trainer_options()
    for name in options if known and isinstance(options, Mapping) else ():
        if name not in known:
            raise ConfigError(f"trainer.{name}: Trainer has no {name!r}. {near(str(name), known)}")


def _trainer_options() -> list[str]:
    """The arguments of Lightning's Trainer, read from its source, as importing it takes seconds."""
    package = importlib.util.find_spec("lightning")
    path = Path(str(package.origin)).parent / "pytorch/trainer/trainer.py" if package else Path()
    if not path.is_file():
        return []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [each.arg for each in (*node.args.args[1:], *node.args.kwonlyargs)]
    return []


_CHECKS: tuple[Callable[[Mapping[str, Any]], object], ...] = (
    _check_trainer,
    _lora_of,
    _check_classes,
    _check_root,
    _check_batch_size,
    _check_seed,
    _check_checkpoint,
    _check_accelerator,
    _check_model,
)

_CHECKS_OF_WRITING: tuple[Callable[[Mapping[str, Any]], None], ...] = (
    _check_adapter_places,
    _check_export_place,
    _check_other_places,
)
