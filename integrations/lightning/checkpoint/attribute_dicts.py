"""Lightning's `AttributeDict` among the hyperparameters of a checkpoint.

torch reads it in no case without unpickling objects, so it is written as a plain dictionary, and the entry says where
it was.
"""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import LightningModule

from lora_plugins.integrations.lightning.checkpoint.entry import KEY
from lora_plugins.integrations.lightning.checkpoint.nested_paths import Path, changed_at

HYPERPARAMETERS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
WRITTEN_AS_DICT = "attribute_dicts"


def with_plain_dicts(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a checkpoint whose hyperparameters hold no `AttributeDict`, and what its entry says of them."""
    if HYPERPARAMETERS not in checkpoint:
        return dict(checkpoint), {}
    paths: list[Path] = []
    plain = _plain(checkpoint[HYPERPARAMETERS], (), paths)
    about = {WRITTEN_AS_DICT: [list(path) for path in paths]} if paths else {}
    return {**checkpoint, HYPERPARAMETERS: plain}, about


def with_attribute_dicts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint whose hyperparameters are what they were before `with_plain_dicts`."""
    result = dict(checkpoint)
    for path in sorted(map(tuple, checkpoint[KEY].get(WRITTEN_AS_DICT, [])), key=len, reverse=True):
        result[HYPERPARAMETERS] = changed_at(result[HYPERPARAMETERS], path, AttributeDict)
    return result


def _plain(value: Any, path: Path, found: list[Path]) -> Any:
    if isinstance(value, AttributeDict):
        found.append(path)
    if type(value) is dict or isinstance(value, AttributeDict):
        return {key: _plain(each, (*path, key), found) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each, (*path, at), found) for at, each in enumerate(value))
    return value
