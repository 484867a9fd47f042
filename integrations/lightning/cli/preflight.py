"""Checks the arguments of a command, where most mistakes are, before the imports that take seconds.

What is found here is answered at once. Everything else is found by LightningCLI, after its imports, and said by
`explained`.
"""

import ast
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.errors import near, near_matches, no_folder
from lora_plugins.field_checks import is_whole
from lora_plugins.integrations.lightning.cli.given_arguments import MISSING, keys_of, read_arguments, value_at
from lora_plugins.integrations.lightning.cli.short_flags import LARGEST_SEED, SHORT
from lora_plugins.writable import check_writable_file, check_writable_folder, from_home

_OF_CHECKPOINTS = frozenset({"last", "hpc"})
_OTHER_FILES = frozenset(
    {".safetensors", ".png", ".jpg", ".jpeg", ".yaml", ".yml", ".json", ".onnx", ".pt2", ".py", ".sh"}
)
_IN_SHARDED = (".metadata", "meta.pt", "checkpoint", "latest")
"""Of a checkpoint that is a folder: what torch's distributed checkpoints, Lightning and DeepSpeed write into one."""

_OURS = "lora_plugins."
"""How the paths of our classes begin."""

_OF_OPTIMIZER: Mapping[str, str] = {
    "lr": "--optimizer.init_args.lr",
    "weight_decay": "--optimizer.init_args.weight_decay",
    "lr_scheduler": "--lr_scheduler",
}
"""Arguments by which our tasks are optimized if there is no section `optimizer:`, and the flags for where it is."""

_OF_A_FILE = ("path", "format", "format_options")
"""The fields of `AdapterFile`, whose module imports torch."""

_OF_A_FOLDER = "FolderDataModule"
"""How the names of the data modules end that read a folder of the user's, `root`."""


def check(
    arguments: Sequence[str], flags: Sequence[str] = (), *, command: str = "fit", writes: bool = False
) -> LoraConfig | None:
    """Checks what can be checked without Lightning.

    `flags` are short ones, as further near matches; `writes` says whether the command writes what a configuration
    names.

    Returns:
        The section `lora:`; None if there is none, or it is to be read elsewhere.

    Raises:
        ConfigError: Of the first mistake, with the flag or key that it is in.
    """
    given = read_arguments(arguments, flags, command)
    _check_trainer(given)
    _check_sections(given)
    lora = _lora_of(given)
    if command == "fit":
        _check_optimization(arguments, given)
    for one in (*_CHECKS, *(_CHECKS_OF_WRITING if writes else ())):
        one(given)
    return lora


def _check_model(given: Mapping[str, Any]) -> None:
    if "model" not in given and "print_config" not in given:
        raise ConfigError("the configuration has no `model:`, and needs it.")


def _check_sections(given: Mapping[str, Any]) -> None:
    """Refuses what is in one of our two sections and belongs in the other, or nowhere."""
    config = [field.name for field in fields(LoraConfig)]
    callback = _arguments_in(Path(__file__).parent.parent / "callback.py")
    callback.remove("config")  # which the section `lora` is
    for section, own, other, others in (
        ("lora", config, "lora_callback", callback),
        ("lora_callback", callback, "lora", config),
    ):
        for name in given[section] if isinstance(given.get(section), Mapping) else ():
            if name not in own and name in others:
                alike = f" {near(name, own)}" if near_matches(name, own) else ""
                raise ConfigError(f"{section} has no field {name!r}; {other} has: {other}.{name}.{alike}")
    for name in given["lora_callback"] if isinstance(given.get("lora_callback"), Mapping) else ():
        if name not in callback:
            raise ConfigError(f"lora_callback has no field {name!r}. {near(str(name), callback)}")


def _lora_of(given: Mapping[str, Any]) -> LoraConfig | None:
    section = given.get("lora")
    if not isinstance(section, Mapping) or "class_path" in section:
        return None
    try:
        return LoraConfig(**section)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"lora: {error}") from error


def _check_optimization(arguments: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuses flags of what the section `optimizer:` replaces; in a file, such as a recipe, it may stand beside it."""
    if not given.get("optimizer") or not str(value_at(given, "model", "class_path")).startswith(_OURS):
        return
    flagged = [keys_of(argument.partition("=")[0]) for argument in arguments if argument.startswith("--")]
    for name, instead in _OF_OPTIMIZER.items():
        keys = ["model", "init_args", name]
        if any(each[:3] == keys for each in flagged) and value_at(given, *keys) is not None:
            flag = f"--{'.'.join(keys)}"
            short = next((f" ({short})" for short, each in SHORT.items() if each.stands_for == flag), "")
            raise ConfigError(
                f"{flag}{short} would not be read: the section `optimizer:` replaces how the task is optimized by "
                f"itself. Write {instead}, or leave out that section: --optimizer null."
            )


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
    if path == "best":
        raise ConfigError(
            "ckpt_path: only the process that trained knows which checkpoint is the best. Name its file, which "
            "fit prints at its end, or write 'last' for that of a ModelCheckpoint with save_last and a dirpath, "
            "without which each run has a folder of its own."
        )
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
    wanted = value_at(given, "trainer", "accelerator")
    if wanted not in ("gpu", "cuda"):
        return
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise ConfigError(f"trainer.accelerator is {wanted!r}, and torch finds no GPU here. Write 'auto' or 'cpu'.")


def _check_batch_size(given: Mapping[str, Any]) -> None:
    size = value_at(given, "data", "init_args", "batch_size")
    if _data_class(given) and size is not MISSING and (not is_whole(size) or size < 1):
        raise ConfigError(f"data.init_args.batch_size is {size!r}; it is a whole number, at least 1.")


def _check_seed(given: Mapping[str, Any]) -> None:
    seed = given.get("seed_everything", True)
    if seed is not None and not (isinstance(seed, int) and 0 <= seed <= LARGEST_SEED):
        raise ConfigError(
            f"seed_everything is {seed!r}; it is a whole number from 0 to {LARGEST_SEED}, or true for a random one."
        )


def _check_root(given: Mapping[str, Any]) -> None:
    root = value_at(given, "data", "init_args", "root")
    if "print_config" in given or not _data_class(given).endswith(_OF_A_FOLDER):
        return  # it is not read, or made first
    if isinstance(root, str) and not Path(root).is_dir():
        raise ConfigError(f"data.init_args.root: {no_folder(Path(root))}")


def _data_class(given: Mapping[str, Any]) -> str:
    """Returns the class path of a data module of ours; empty for those of others, whose arguments are their matter."""
    path = str(value_at(given, "data", "class_path"))
    return path if path.startswith(_OURS) else ""


def _check_adapter_places(given: Mapping[str, Any]) -> None:
    named, setting = value_at(given, "lora_callback", "save_adapter_to"), "lora_callback.save_adapter_to"
    for entry in named if isinstance(named, list) else [named]:
        if isinstance(entry, str):
            check_writable_folder(Path(from_home(entry)), setting)
        if isinstance(entry, Mapping) and "class_path" not in entry:
            _check_adapter_file(entry, setting)


def _check_adapter_file(entry: Mapping[str, Any], setting: str) -> None:
    """Refuses what is no `AdapterFile`: LightningCLI would take the text of such a flag for a path."""
    for name in entry:
        if name not in _OF_A_FILE:
            raise ConfigError(f"{setting}: a file has no {name!r}. {near(str(name), _OF_A_FILE)}")
    if "path" not in entry:
        raise ConfigError(f"{setting} is {dict(entry)}; it has no 'path', where the file is to be written.")


def _check_export_place(given: Mapping[str, Any]) -> None:
    named, setting = value_at(given, "lora_callback", "export_to"), "lora_callback.export_to"
    if not isinstance(named, str):
        return
    path = Path(from_home(named))
    check_writable_file(path, setting)
    if path.exists() and path.resolve() in {Path(text).resolve() for text in _texts(given.get("model"))}:
        raise ConfigError(f"{setting} is {named}, which the model is read from: it would be replaced. Name a new file.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(each)


def _check_other_places(given: Mapping[str, Any]) -> None:
    root, callbacks = value_at(given, "trainer", "default_root_dir"), value_at(given, "trainer", "callbacks")
    if isinstance(root, str) and "://" not in root:
        check_writable_folder(Path(from_home(root)), "trainer.default_root_dir")
    for number, callback in enumerate(callbacks if isinstance(callbacks, list) else ()):
        path = value_at(callback, "init_args", "path")
        if str(value_at(callback, "class_path")).startswith(_OURS) and isinstance(path, str):
            check_writable_file(Path(from_home(path)), f"trainer.callbacks[{number}].init_args.path")


def _check_trainer(given: Mapping[str, Any]) -> None:
    options, known = given.get("trainer"), _trainer_options()
    for name in options if known and isinstance(options, Mapping) else ():
        if name not in known:
            raise ConfigError(f"trainer.{name}: Trainer has no {name!r}. {near(str(name), known)}")


def _trainer_options() -> list[str]:
    package = importlib.util.find_spec("lightning")
    path = Path(str(package.origin)).parent / "pytorch/trainer/trainer.py" if package else Path()
    return _arguments_in(path) if path.is_file() else []


def _arguments_in(path: Path) -> list[str]:
    """The arguments of the constructor in a Python file, read from its source, as importing it takes seconds."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [each.arg for each in (*node.args.args[1:], *node.args.kwonlyargs)]
    return []


def _check_amount(given: Mapping[str, Any]) -> None:
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        limit = value_at(given, "trainer", name)
        if limit == 0 and not isinstance(limit, bool):
            raise ConfigError(f"trainer.{name} is 0, and fit would train nothing, and leave that as its results.")
    batches = value_at(given, "trainer", "accumulate_grad_batches")
    if isinstance(batches, int) and batches < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches is {batches}, and a step is of 1 batch or more.")


_CHECKS: tuple[Callable[[Mapping[str, Any]], None], ...] = (
    _check_classes,
    _check_root,
    _check_batch_size,
    _check_seed,
    _check_checkpoint,
    _check_accelerator,
    _check_model,
)

_CHECKS_OF_WRITING: tuple[Callable[[Mapping[str, Any]], None], ...] = (
    _check_amount,
    _check_adapter_places,
    _check_export_place,
    _check_other_places,
)
