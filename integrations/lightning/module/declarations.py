"""What a LightningModule may declare.

`head_modules` names newly initialized modules, `lora_targets` the layers that are worth adapting, and `file_entries`
returns what the files of an adapter hold besides.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.errors import listing
from lora_plugins.files import OWN_ENTRIES
from lora_plugins.inplace import model_modules, named_parameters
from lora_plugins.plan import matches
from lora_plugins.utils import within


def with_declarations(config: LoraConfig, module: LightningModule, target: nn.Module, path: str | None) -> LoraConfig:
    """Returns a config that also trains the declared heads, and has the declared targets if it names none.

    An optional attribute `head_modules` of the module holds names relative to it, and `lora_targets` what stands for
    `target_modules` in a config that names none.

    Raises:
        ConfigError: If a declared head does not exist, or its name would match other modules as well; or if the
            declared targets are layers of another part of the module.
    """
    given: Iterable[str] | str = getattr(module, "head_modules", ())
    declared = [given] if isinstance(given, str) else given
    prefix = f"{path}." if path else ""
    heads = [name.removeprefix(prefix) for name in declared if name.startswith(prefix)]
    names = [*(entry.name for entry in model_modules(target)), *named_parameters(target)]
    for head in heads:
        if head not in names:
            raise ConfigError(f"{type(module).__name__}.head_modules names {prefix + head!r}, which does not exist.")
        others = [name for name in names if name.endswith("." + head)]
        if others:
            raise ConfigError(
                f"The head {prefix + head!r} of {type(module).__name__} shares its name with {listing(others)}, which "
                "modules_to_save would match too. Set LoraCallback(target=None), where names are longer."
            )
    added = [head for head in heads if head not in config.modules_to_save]
    config = replace(config, modules_to_save=[*config.modules_to_save, *added]) if added else config
    suggested = getattr(module, "lora_targets", None)
    if config.target_modules is not None or not suggested:
        return config
    _check_place(suggested, module, path, names)
    targets = suggested if isinstance(suggested, str) else _worth(list(suggested), config, names)
    return replace(config, target_modules=targets)


def file_entries(module: nn.Module, path: str) -> Mapping[str, Any]:
    """Returns what a module's own `file_entries` adds to the files of the adapter at `path`, as JSON by name.

    It is asked after the training, which an entry shall not cost: a warning names those that are left out.
    """
    declared = getattr(module, "file_entries", None)
    said = {} if declared is None else declared(path)
    given = said if isinstance(said, Mapping) else {}
    entries = {name: entry for name, entry in given.items() if name not in OWN_ENTRIES and _is_json({name: entry})}
    left_out: list[Any] = [name for name in given if name not in entries] if given is said else [said]
    if left_out:
        rank_zero_warn(
            f"file_entries() of {type(module).__name__} returns {listing(left_out)}. It returns JSON by name, by names "
            "that the manifest of an adapter has not itself; the files are written without."
        )
    return entries


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _check_place(suggested: Sequence[str] | str, module: nn.Module, path: str | None, names: Sequence[str]) -> None:
    """Refuses a target in which the suggestions match nothing, if there is one in which all of them do."""
    if all(matches("target_modules", suggested, names).values()):
        return
    for entry in model_modules(module):
        inside = [each.name for each in model_modules(entry.module)]
        if all(matches("target_modules", suggested, inside).values()):
            raise ConfigError(
                f"{type(module).__name__} declares which layers a LoraConfig without target_modules adapts, and they "
                f"are in {entry.name or 'the whole module'!r}, not in {path or 'the whole module'!r}. Set "
                f"LoraCallback(target={entry.name or None!r}), or name target_modules."
            )


def _worth(suggested: list[str], config: LoraConfig, names: Sequence[str]) -> list[str]:
    """Returns the suggestions except those that match only modules that are trained in full."""
    saved = {name for found in matches("modules_to_save", config.modules_to_save, names).values() for name in found}
    meant = matches("target_modules", suggested, names)
    # One without a match is a mistake, to be told.
    kept = [each for each, found in meant.items() if not found or not all(within(name, saved) for name in found)]
    return kept or suggested
