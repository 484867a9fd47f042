"""Names that modules of transformers had in earlier versions of it.

Transformers 5 renamed modules of many models (`query` is `q_proj` now, `encoder.layer` is `layers`). Adapters and
configs of before speak of the former names. The table of renamings is transformers' own, by which it loads old
checkpoints; transformers is not imported for it, since a model of its classes is not there without it.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lora_plugins.config import LoraConfig
from lora_plugins.errors import listing, quoted
from lora_plugins.inplace import full_name, model_modules, modules_by_name
from lora_plugins.plan.patterns import ends_with, matches
from lora_plugins.utils import within

_TENSOR = ".weight"
"""What stands behind the name of a module in the keys that transformers renames."""


def former_names(model: nn.Module) -> dict[str, str]:
    """Returns the former name of each module that transformers renamed, by its name; empty for most models."""
    found: dict[str, str] = {}
    for path, part in _parts(model):
        renamings = [renaming.reverse_transform() for renaming in reversed(_renamings(part))]
        for name in (entry.name for entry in model_modules(part)):
            former = _renamed(name, renamings)
            if name and former != name:
                found[full_name(path, name)] = full_name(path, former)
    return found


def current_name(model: nn.Module) -> Callable[[str], str]:
    """Returns a function that gives the present name of a module or tensor by a former one; others stay."""
    parts = [(full_name(path, ""), _renamings(part)) for path, part in _parts(model)]

    def current(name: str) -> str:
        for start, renamings in parts:
            if name.startswith(start):
                return start + _renamed(name.removeprefix(start), renamings)
        return name

    return current


def with_current_names(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Returns a config whose `target_modules` uses a model's present names, and warns where it did not."""
    targets = config.target_modules
    if targets is None or targets == "all":
        return config
    names = list(modules_by_name(model))
    lost = [pattern for pattern, matched in matches("target_modules", targets, names).items() if not matched]
    former = former_names(model) if lost else {}
    found = {pattern: _meant(pattern, targets, former, names) for pattern in lost}
    if not any(found.values()):
        return config
    said = "; ".join(f"{quoted(pattern)} is {listing(meant)} now" for pattern, meant in found.items() if meant)
    warnings.warn(f"target_modules: transformers has renamed modules of this model. {said}.", stacklevel=2)
    patterns = [targets] if isinstance(targets, str) else targets
    present = [name for pattern in patterns for name in (found.get(pattern) or [pattern])]
    return replace(config, target_modules=list(dict.fromkeys(present)))


def _meant(pattern: str, targets: list[str] | str, former: Mapping[str, str], names: list[str]) -> list[str]:
    """Returns the modules that a pattern meant by former names: as path ends, where these are unambiguous."""
    asked = targets if isinstance(targets, str) else [pattern]
    found = set(matches("target_modules", asked, list(former.values()))[pattern])
    meant = [name for name, old in former.items() if old in found]
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in meant))
    matched = [name for name in names if any(ends_with(end, name) for end in ends)]
    return ends if sorted(matched) == sorted(meant) else meant


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the outermost models of transformers in a model, by their paths."""
    library = sys.modules.get("transformers.modeling_utils")  # transformers itself would import it for a name of it
    base: Any = getattr(library, "PreTrainedModel", None)
    if base is None:
        return []
    found: dict[str, nn.Module] = {}
    for entry in model_modules(model):  # outer ones first
        if isinstance(entry.module, base) and not within(entry.name, found):
            found[entry.name] = entry.module
    return [*found.items()]


def _renamings(part: nn.Module) -> list[Any]:
    """Returns the renamings of a model of transformers, in order; none where this version has no such table.

    A renaming maps one name to one name; what also computes new tensors is left out.
    """
    try:
        table = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(part)
    except (ImportError, AttributeError):
        return []
    return [each for each in table if not hasattr(each, "operations")]


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    key = name + _TENSOR
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key.removesuffix(_TENSOR)
