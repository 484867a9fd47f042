"""Explains in one sentence what jsonargparse says in many lines about a wrong argument."""

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import FrameType

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LRScheduler

from lora_plugins import ConfigError
from lora_plugins.errors import LoraError, near, near_matches
from lora_plugins.integrations.lightning.cli.preflight import LISTED

_KEY = re.compile(r'(?<!- )(?:Parser key|Key) "([^"]+)"')
"""Where something is wrong; in a list of attempts (`- Parser key "model": ...`), the same key comes again."""

_CLASS = re.compile(r"given class_path '([^']+)'")
_TYPES: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [224, 224]",
    "dict": "a table, such as {a: 1}",
    "collections.abc.Iterable": "a list, such as [a, b]",
    "collections.abc.Sequence": "a list, such as [a, b]",
}

_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
"""The keys of a table that names a class."""

_LIBRARIES = frozenset({"lightning", "pytorch_lightning", "torch", *sys.stdlib_module_names})
"""What a constructor of these refuses is an argument; what code of the user raises may be a mistake there."""

_PARSERS = frozenset({"jsonargparse", "lora_plugins", *_LIBRARIES})
"""What builds the classes of a configuration."""

_NO_DATA = re.compile(r"`(\w+_dataloader)` must be implemented")
"""Begins what Lightning says where there is no data, as if a module had to have it."""

_OF_THE_CPU = "DefaultCPUAllocator: "
"""Begins what torch says where the memory of a CPU is too small, in an error of no class of its own."""


def explained(message: str, flags: Iterable[str] = ()) -> str:
    """Returns what is wrong with an argument, where, and what is near it, by jsonargparse's message and the flags."""
    where = ".".join(_KEY.findall(message))
    classes = _CLASS.findall(message)
    for key in re.findall(r"'([\w-]+)'", message):
        # Only what is nearly the same: the message quotes whole tables, and arguments may be called `init_kwargs`.
        if key not in _OF_A_CLASS and (alike := difflib.get_close_matches(key, _OF_A_CLASS, n=1, cutoff=0.92)):
            said = f"there is no {key!r} of a class. Did you mean {alike[0]!r}?"
            return f"{where}: {said}" if where else said
    for pattern, say in _REASONS:
        if (found := re.search(pattern, message)) is not None:
            said = say(found, classes[-1] if classes else "", list(flags))
            return f"{where}: {said}" if where else said
    return "\n".join(line for line in message.splitlines() if "NoneType" not in line).strip()


@contextmanager
def explained_run() -> Iterator[None]:
    """Turns errors of Lightning about arguments, schedulers' and those of too little memory into one message.

    Raises:
        ConfigError: Of such an error.
    """
    try:
        yield
    except MisconfigurationException as error:
        said = " ".join(str(error).split())
        if lacking := _NO_DATA.match(said):
            said = f"Neither the data nor the module has a {lacking[1]}. Name a data module with one by `data:`."
        raise ConfigError(said) from error
    except ZeroDivisionError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") != LRScheduler.__module__ or "self" not in frame.f_locals:
            raise
        raise ConfigError(
            f"{type(frame.f_locals['self']).__name__} divides by zero, by one of its arguments that are 0: "
            f"{', '.join(_arguments_of_zero(frame))}. Give the number that is meant, of steps or of epochs."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and _OF_THE_CPU not in str(error):
            raise
        said = (str(error).partition(_OF_THE_CPU)[2] or str(error)).partition(". ")[0]
        raise ConfigError(
            f"The memory of the device is too small{': ' if said else ''}{said}. Take a smaller --batch-size, "
            "--trainer.precision bf16-mixed, smaller images, or --model.init_args.gradient_checkpointing true."
        ) from error


def _arguments_of_zero(frame: FrameType) -> list[str]:
    """Returns the arguments of a scheduler, in one of whose methods a frame is, that are 0, and not by default."""
    scheduler = frame.f_locals["self"]
    values = {**vars(scheduler), **frame.f_locals}
    parameters = inspect.signature(type(scheduler)).parameters
    return [name for name, each in parameters.items() if values.get(name) == 0 and each.default != 0]


@contextmanager
def explained_building() -> Iterator[None]:
    """Turns what a constructor of a library refuses, and jsonargparse reports in many lines, into one message.

    Raises:
        ConfigError: Of such an error.
    """
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        refused: BaseException = error
        while refused.__cause__ is not None:
            refused = refused.__cause__
        said = _refused(refused, str(error))
        if said is None:
            raise
        raise ConfigError(said) from error


def _refused(error: BaseException, message: str) -> str | None:
    """What a constructor says of its arguments in an error, of which jsonargparse makes a message; None for others."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    if packages[-1:] == ["jsonargparse"] and "argument after ** must be a mapping" in str(error):
        # jsonargparse lets a value pass where a dataclass in a dataclass belongs, and fails to build it.
        tables = [f"{cls.rpartition('.')[2]}.{each}" for cls in _tried(message) for each in _tables(cls)]
        return f"{' or '.join(tables) or 'A field of a table'} is no table, such as {{a: 1}}, and has to be one."
    if not isinstance(error, ImportError | MisconfigurationException | TypeError | ValueError):
        return None
    refusing = _refusing_constructor(frames, packages)
    return None if refusing is None else f"{type(refusing).__name__}: {' '.join(str(error).split())}"


def _refusing_constructor(frames: Sequence[FrameType], packages: Sequence[str]) -> object | None:
    """Returns the object in whose `__init__` a library raised, by the packages of the frames; None for other errors.

    What called that constructor are parsers alone, and what it called are libraries: no code of the user is between.
    """
    for at, frame in enumerate(frames):
        if frame.f_code.co_name == "__init__" and "self" in frame.f_locals:
            is_given = _PARSERS.issuperset(packages[:at]) and _LIBRARIES.issuperset(packages[at:])
            return frame.f_locals["self"] if is_given else None
    return None


def _tried(message: str) -> list[str]:
    """The classes of the innermost union of types that jsonargparse tried."""
    *_, types = re.findall(r"Subtypes: \[(.*)\]", message) or [""]
    return re.findall(r"<class '([\w.]+)'>", types)


def _tables(cls: str) -> list[str]:
    """The fields of a dataclass that are dataclasses themselves."""
    found = _imported(cls)
    return [each.name for each in fields(found) if is_dataclass(each.type)] if is_dataclass(found) else []


def _option(found: re.Match[str], cls: str, flags: list[str]) -> str:
    if found[1] == "class_path":
        return "beside class_path there is init_args alone: the options of the class belong in it."
    name, known = cls.rpartition(".")[2], _parameters(cls)
    if name in _expected(found.string):  # where a table names no class, jsonargparse gives its options to this one
        hint = f"{near(found[1], known)} Else name" if near_matches(found[1], known) else "Name"
        return f"{name} has no {found[1]!r}. {hint} the class that has it: class_path: package.module.Class."
    return f"{name or 'it'} has no {found[1]!r}. {near(found[1], known)}"


def _expected(message: str) -> set[str]:
    """Returns the names of the classes that jsonargparse would take."""
    return {
        name for line in re.findall(r"Subtypes: \[(.*)\]", message) for name in re.findall(r"\.(\w+)\b(?!\.)", line)
    }


def _option_of_callable(found: re.Match[str], cls: str, flags: list[str]) -> str:
    if found[1] not in _parameters(found[2]):
        return _option(found, found[2], flags)
    called = found[2].rpartition(".")[2]
    return f"{found[1]!r} of {called} is what {cls.rpartition('.')[2] or 'its caller'} gives it, and cannot be set."


def _nested_option(found: re.Match[str], cls: str, flags: list[str]) -> str:
    if not cls:
        return f"there is no flag {found[1]}. {near(found[1], flags)}"
    name = found[1].lstrip("-").partition("=")[0]
    first, parameters = name.partition(".")[0], _parameters(cls)
    if parameters and first not in parameters:
        return f"{cls.rpartition('.')[2]} has no {first!r}. {near(first, parameters)}"
    outer, _, inner = name.rpartition(".")
    known = _fields_below(cls, outer)
    return f"{outer or cls} has no {inner!r}." + (f" {near(inner, known)}" if known else "")


def _field(found: re.Match[str], cls: str, flags: list[str]) -> str:
    known = _fields_below(cls, found[1].rpartition(".")[2])
    return f"{found[1]} has no {found[2]!r}." + (f" {near(found[2], known)}" if known else "")


def _attribute(found: re.Match[str], cls: str, flags: list[str]) -> str:
    module = importlib.import_module(found[1])
    if cls.startswith(f"{found[1]}.{found[2]}."):
        within = [each.name for each in pkgutil.iter_modules(getattr(module, "__path__", ())) if each.name[0] != "_"]
        return f"{found[1]} has no module {found[2]!r}. {near(found[2], within)}"
    names = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
    return f"{found[1]} has no {found[2]!r}. {near(found[2], names)}"


def _module(found: re.Match[str], cls: str, flags: list[str]) -> str:
    return f"{cls or 'a class'} cannot be imported: there is no module {found[1]!r}. Install it, or mend the path."


def _wrong_type(found: re.Match[str], cls: str, flags: list[str]) -> str:
    nested = re.fullmatch(r"NestedArg\(key='(.+)', val='(.*)'\)", found[2].strip())
    value, types = nested[2] if nested else found[2], {*re.findall(r"Expected a <class '([\w.]+)'>", found.string)}
    return _has_to_be("float" if {"int", "float"} <= types else found[1], value)


def _has_to_be(kind: str, given: str) -> str:
    return f"it is {_TYPES.get(kind, kind)}, and {given!r} was given."


def _choice(found: re.Match[str], cls: str, flags: list[str]) -> str:
    value, choices = found[1].strip(), re.findall(r"typing\.Literal\[([^\]]+)\]", found.string)
    known = {word.strip("' ") for choice in choices for word in choice.split(",")}
    return f"it cannot be {value!r}. {near(value, known)}"


def _no_class(found: re.Match[str], cls: str, flags: list[str]) -> str:
    if _is_a_table(found):
        return _has_to_be("dict", found[2])
    return f"{found[2]!r} is no class of a {found[1]}. Write its path: package.module.Class."


def _returned(found: re.Match[str], cls: str, flags: list[str]) -> str:
    return f"{found[1]!r} is no class of a {found[2]}, and no function that returns one."


def _required(found: re.Match[str], cls: str, flags: list[str]) -> str:
    names = [name.strip().rpartition(".")[2] for name in found[1].split(",")]
    return f"the configuration has no {' and no '.join(f'`{name}:`' for name in names)}, and needs it."


def _is_a_table(found: re.Match[str]) -> bool:
    """Whether a dataclass was tried where something is wrong: a table gives its fields, and no class is named."""
    return any(is_dataclass(_imported(each)) for each in _tried(found.string[: found.start()]))


_OF_OTHERS = ("torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
"""Packages of which a configuration may name classes without their paths."""


def _class_path(found: re.Match[str], cls: str, flags: list[str]) -> str:
    if _is_a_table(found):
        return f"it is {_TYPES['dict']}, or the path of a file that holds one, and {found[1]!r} was given."
    name = found[1].rpartition(".")[2]
    packages = (*_OF_OTHERS, *LISTED)
    known = {each: f"{package}.{each}" for package in packages for each in importlib.import_module(package).__all__}
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f" Did you mean {known[alike[0]]!r}?" if alike else ", such as torch.optim.AdamW."
    return f"{found[1]!r} is not the path of a class{'.' if alike else ''}{hint}"


_Say = Callable[[re.Match[str], str, list[str]], str]
_REASONS: tuple[tuple[str, _Say], ...] = (
    (r"([\w.]+ needs [\w.]+\. Run: pip install '[^']+')", lambda found, *_: found[1]),
    (r"unrecognized arguments: (\S+)", _nested_option),
    (r"Option '(\w+)[\w.]*' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", _option_of_callable),
    (r"Option '(\w+)[\w.]*' is not accepted", _option),
    (r"Group '([\w.]+)' does not accept option '(\w+)", _field),
    (r"module '([\w.]+)' has no attribute '(\w+)'", _attribute),
    (r"No module named '([\w.]+)'", _module),
    (r"(?:Expected a dot import path string|Unexpected import path format): (\S+)", _class_path),
    (r"Expected '([\w.]+)' to be a (?:subclass of|function that returns) <class '(\w+)'>", _returned),
    (r"(?s)typing\.Literal\[.*?(?:Given|Got) value: ([^\n]+)", _choice),
    (r"(?s)Import path does not correspond to a subclass of (\w+).*Given value: ([^\n]+)", _no_class),
    (r"the following arguments are required: (.+)", _required),
    (r"Expected a <class '(?!NoneType)([\w.]+)'>\. Got value: (.+)", _wrong_type),
    (r"(?s)Expected a <class '(?!NoneType)([\w.]+)'>.*?Given value: ([^\n]+)", _wrong_type),
    (
        r"(?s)Expected a tuple with (\d+) elements(?:\. Got value: |.*?Given value: )([^\n]+)",
        lambda found, *_: f"it is a list of {found[1]}, and {found[2]} was given.",
    ),
    (r"File does not exist: '([^']+)'", lambda found, *_: f"there is no file {found[1]}."),
    (r"Unable to load config '([^']*)'", lambda found, *_: _has_to_be("dict", found[1])),
    (r"(?s)Not a valid subclass of (\w+).*?(?:Got|Given) value: ([^\n]+)", _no_class),
    (
        r"Given value: .*?'(class_path|init_args)'(?:, val=|: )None\b",
        lambda found, *_: f"its {found[1]} is empty. Write what belongs there, or leave it out.",
    ),
    (r'(?:Key|Option) "([^"]+)" is required', lambda found, *_: f"{found[1]!r} is missing, and has no default."),
)
"""What jsonargparse says, in the order in which it is looked for, and what says it better."""


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(cls: str) -> list[str]:
    """The parameters of a class, with those that it hands on to the classes it inherits from."""
    found = _imported(cls)
    names: dict[str, None] = {}
    for each in inspect.getmro(found) if isinstance(found, type) else ():
        if "__init__" in vars(each):
            parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
            names |= {each.name: None for each in parameters if each.kind in _BY_NAME and each.name != "self"}
            if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters):
                break
    return list(names)


def _fields_below(cls: str, parameter: str) -> list[str]:
    """The fields of the dataclass that a parameter of a class takes."""
    found = _imported(cls)
    if found is None:
        return []
    declared = inspect.get_annotations(found.__init__, eval_str=True).get(parameter)
    return list(getattr(declared, "__dataclass_fields__", ()))


def _imported(path: str) -> Callable[..., object] | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if callable(found) else None
