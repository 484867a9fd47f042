"""Checks arguments of methods and functions: swapped ones, those of a wrong type, and configs of another library."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, counted
from lora_plugins.field_checks import (
    Check,
    check_chosen,
    check_flag,
    check_name,
    check_names,
    check_options,
    check_ordered,
    check_paths,
    check_plugins,
    check_registry,
    check_share,
    finite,
    shown,
)
from lora_plugins.words import ARGUMENTS, FIELDS

Class = TypeVar("Class")
Function = TypeVar("Function", bound=Callable[..., Any])
Name = TypeVar("Name", bound=str | None)

_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model": ((nn.Module,), "a torch.nn.Module"),
    "config": ((LoraConfig,), "a LoraConfig of lora_plugins"),
    "adapter_name": ((str,), "the name of an adapter"),
    "path": ((str, os.PathLike), "a path"),
    "dequantize": ((bool,), "True or False"),
}
"""By the name of a parameter, the types it can have, and what they are called; such arguments may be swapped."""

_CHECKS: Mapping[str, Check] = {
    "adapter_names": check_chosen,
    "adapters": check_chosen,
    "weights": check_ordered,
    "trainable": check_flag,
    "max_error": check_share,
    "combination_type": check_name,
    "format": check_name,
    "format_options": check_options,
    "repository": check_name,
    "base_model": check_name,
    "license": check_name,
    "revision": check_name,
    "private": check_flag,
    "metrics": check_options,
    "registry": check_registry,
    "extra": check_plugins,
    "allow": check_names,
    "block": check_names,
    "files": check_paths,
}
"""By the name of another parameter, what it can hold. Where None is the default, it can be given."""

_RENAMED: Mapping[str, str] = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init"}
"""Fields of PEFT's LoraConfig that have the same values here, under another name."""

_INITS = frozenset(["gaussian", "pissa", "olora", "orthogonal", "eva", "lora_ga", "loftq"])
"""Starts that have the same name in PEFT."""


def with_checked_arguments(cls: type[Class]) -> type[Class]:
    """Lets the public methods of a class, and its constructor, check their arguments before they run."""
    for name, member in list(vars(cls).items()):
        bound = isinstance(member, staticmethod | classmethod)
        function = member.__func__ if bound else member
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            call = cls.__name__ if name == "__init__" else f"{cls.__name__}.{name}"
            checked = _checked(function, call, skip=not isinstance(member, staticmethod))
            setattr(cls, name, type(member)(checked) if bound else checked)
    return cls


def with_checked_call(function: Function) -> Function:
    """Lets a public function check its arguments before it runs."""
    return cast(Function, _checked(function, function.__name__, skip=0))


def check_arguments(call: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks the arguments of a call, before Python does; its signature has no `self` or `cls`.

    Raises:
        ConfigError: If arguments are swapped, of a wrong type, or called otherwise.
    """
    parameters = signature.parameters
    for key in kwargs:
        if key in ARGUMENTS and key not in parameters:
            raise ConfigError(f"{call} has no argument {key!r}. {ARGUMENTS[key]}")
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    given = {
        key: value
        for key, value in given.items()
        if key in parameters and (value is not None or parameters[key].default is not None)
    }
    wrong = {key: value for key, value in given.items() if key in _TYPES and not _fits(key, value)}
    if wrong:
        needed = [name for name, each in parameters.items() if each.default is each.empty or name == "config"]
        form = f"Write {call}({', '.join(needed)})."
        if all(any(_fits(other, value) for other in wrong) for value in wrong.values()):
            raise ConfigError(f"{call}: the arguments are swapped. {form}")
        key, value = next(iter(wrong.items()))
        raise ConfigError(f"{call}: {_wrong_type(key, value)} {_remedy(key, value) or form}")
    for key, check in _CHECKS.items():
        if key in given:
            check(f"{call}: {key}", given[key])


def check_config(call: str, config: Any) -> None:
    """Checks that a config, which was given to a call, is one of ours.

    Raises:
        ConfigError: If it is something else, with what to write instead.
    """
    if not _fits("config", config):
        raise ConfigError(f"{call}: {_wrong_type('config', config)} {_remedy('config', config)}".rstrip())


def chosen_names(adapter_names: str | Sequence[Name], ordered: str = "") -> tuple[str | Name, ...]:
    """Returns one name, which Python takes for a sequence of its letters, or several.

    Args:
        adapter_names: What is given.
        ordered: What messages call it where the order counts; empty where it does not.

    Raises:
        ConfigError: If the order counts and there is none.
    """
    if isinstance(adapter_names, str):
        return (adapter_names,)
    if ordered:
        check_ordered(ordered, adapter_names)
    return tuple(adapter_names)


def weighted(adapters: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Returns adapters, each with the weight that a caller gave for it.

    Raises:
        ConfigError: If there is not one weight for each, or one is no finite number.
    """
    if len(adapters) != len(weights):
        raise ConfigError(
            f"{counted(len(adapters), 'adapter')} and {counted(len(weights), 'weight')}: give one weight for each "
            "adapter."
        )
    return [(name, finite(f"The weight of {name!r}", weight)) for name, weight in zip(adapters, weights, strict=True)]


def _checked(function: Callable[..., Any], call: str, skip: int) -> Callable[..., Any]:
    """Returns a function that checks its arguments, all but the first `skip`."""
    signature = inspect.signature(function)
    signature = signature.replace(parameters=[*signature.parameters.values()][skip:])

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_arguments(call, signature, args[skip:], kwargs)
        return function(*args, **kwargs)

    return checked


def _fits(parameter: str, value: Any) -> bool:
    return isinstance(value, _TYPES[parameter][0])


def _wrong_type(parameter: str, value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    name = kind.__name__
    article = "the class" if kind is value else "an" if name[0].lower() in "aeiou" else "a"
    what = f"{article} {name}"
    library = kind.__module__.partition(".")[0]
    origin = f" of {library}" if name.endswith("LoraConfig") and not issubclass(kind, LoraConfig) else ""
    return f"{parameter} is {what}{origin}, and has to be {_TYPES[parameter][1]}."


def _remedy(parameter: str, value: Any) -> str:
    """Returns what to write instead of a value; empty where only the type tells."""
    if parameter == "model":
        return "The module is its attribute 'model'." if isinstance(getattr(value, "model", None), nn.Module) else ""
    if parameter != "config":
        return ""
    if isinstance(value, Mapping):
        return "Write LoraConfig(**values)."
    if isinstance(value, type):
        return "Write LoraConfig(...), an instance."
    if isinstance(value, str | os.PathLike):
        return f"A saved adapter is loaded by LoraModel.load_adapter(model, {os.fspath(value)!r})."
    method = getattr(value, "peft_type", None)
    if method is None or not dataclasses.is_dataclass(value):
        return ""
    name = str(getattr(method, "value", method))
    return _translated(value) if name == "LORA" else f"Of PEFT's methods {name!r} is none that is here; LORA is."


def _translated(config: Any) -> str:
    """Returns our fields that correspond to what a config of PEFT sets."""
    ours = {each.name for each in dataclasses.fields(LoraConfig)}
    same: dict[str, Any] = {}
    others: list[str] = []
    for each in dataclasses.fields(config):
        value, word = getattr(config, each.name), FIELDS.get(each.name, "")
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        # Without elements, a field says nothing; 0 is a block, and False a start.
        if value == default or (not value and not isinstance(value, int)):
            continue
        name = _RENAMED.get(each.name, each.name)
        if each.name == "use_dora":
            same["variant"] = "dora"
        elif name == "init" and value is False:
            same["init"] = "none"
        elif name in ours and (name != "init" or value in _INITS):
            same[name] = sorted(value) if isinstance(value, set | frozenset) else value
        elif not word.startswith("Leave it out"):
            others.append(f" {each.name!r}: {word or 'There is nothing like it here.'}")
    fields = ", ".join(
        f"{name}={shown(value) if len(repr(value)) > 200 else repr(value)}" for name, value in same.items()
    )
    return f"Write LoraConfig({fields}) of lora_plugins.{''.join(others)}"
