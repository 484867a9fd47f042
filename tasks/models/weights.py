"""Finds weights and loads them strictly.

A new head is the only thing that a file may lack. Which modules can be a head is known before the file is opened;
every other key that is missing, unexpected or of another shape is an error that lists it.
"""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_plugins.errors import counted
from lora_plugins.files import PICKLED
from lora_plugins.tasks.errors import WeightsError, listed, unknown
from lora_plugins.tasks.models.installed_weights import INSTALLED, installed_file
from lora_plugins.tasks.models.network import is_inside

NONE, PRETRAINED, PACKAGE = "none", "pretrained", "package:"
FOLDER_FILE = "model.safetensors"
STATE_DICTS = ("state_dict", "model_state_dict", "model")
"""Where a file of `torch.save` holds its state dict, if not at the top."""

DISTRIBUTED_PREFIX = "module."
TASK_PREFIX = "network."


@dataclass(frozen=True)
class Difference:
    """How a file of weights differs from the network that should load it: keys, and shapes in file and network."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def between(cls, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> "Difference":
        """Compares a file's tensors with a network's own."""
        pairs = ((key, tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state)
        return cls(
            missing=frozenset(own.keys() - state.keys()),
            unexpected=frozenset(state.keys() - own.keys()),
            mismatched=tuple(pair for pair in pairs if pair[1] != pair[2]),
        )


def new_modules(
    difference: Difference, keys: Iterable[str], *, heads: Sequence[str], base: str | None, where: str
) -> tuple[str, ...]:
    """The modules that a file does not hold, if they can be a new head and nothing else is wrong.

    A head is new if the file has none of it, or if shapes in it differ; then the modules that hold those tensors are
    new. A file written for another task may have that task's head: its keys lie outside `base`, and are ignored if a
    head of ours is new.

    Raises:
        WeightsError: With every key that is missing, unexpected or mismatched without being part of a new head.
    """
    owned = list(keys)
    absent = [head for head in heads if difference.missing.issuperset(k for k in owned if is_inside(k, [head]))]
    mismatched = {key.rpartition(".")[0] for key, _, _ in difference.mismatched if is_inside(key, heads)}
    new = [*absent, *sorted(name for name in mismatched if not is_inside(f"{name}.", absent))]
    foreign = {k for k in difference.unexpected if base is not None and absent and not is_inside(k, [base])}
    problems = [
        *(f"missing in the file: {key}" for key in sorted(difference.missing) if not is_inside(key, new)),
        *(f"not in the network: {key}" for key in sorted(difference.unexpected - foreign)),
        *(
            f"another shape: {key} is {list(theirs)} in the file and {list(ours)} in the network"
            for key, theirs, ours in sorted(difference.mismatched)
            if not is_inside(key, new)
        ),
    ]
    if problems:
        raise WeightsError(
            f"The weights of {where} do not fit the network "
            f"({counted(len(problems), 'difference')}):\n{listed(problems)}\nOnly a new head may be missing or have "
            f"another shape; here that is: {', '.join(heads) or 'nothing'}. Check the architecture's name and options."
        )
    return tuple(new)


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], *, heads: Sequence[str], base: str | None, where: str
) -> tuple[str, ...]:
    """Loads a state dict into a network, except for a new head.

    Returns:
        The names of the modules that stay newly initialized, see `new_modules`.

    Raises:
        WeightsError: If anything but a new head differs; the network is then untouched.
    """
    own = module.state_dict()
    new = new_modules(Difference.between(state, own), own, heads=heads, base=base, where=where)
    loaded = {key: tensor for key, tensor in state.items() if key in own and not is_inside(key, new)}
    module.load_state_dict(loaded | {key: own[key] for key in own if is_inside(key, new)})
    return new


def read_weights(weights: str) -> dict[str, Tensor]:
    """Reads the tensors that `weights` names: a file, a folder with a `model.safetensors`, or `package:NAME`.

    A file of a whole task, whose keys all start with `network.`, is read as that of its network. Files of `torch.save`
    are read with `weights_only=True`.

    Raises:
        WeightsError: If there is no such file, or if it holds no tensors by name.
    """
    if weights.startswith(PACKAGE):
        return _read_packaged(weights.removeprefix(PACKAGE))
    path = Path(weights)
    path = path / FOLDER_FILE if path.is_dir() else path
    if not path.is_file():
        raise _not_found(weights, path)
    return _read_file(path)


def packaged_weights() -> tuple[str, ...]:
    """Names of the weights that are shipped with this package, or in a package that its extras bring along."""
    return (*sorted(_shipped_weights()), *INSTALLED)


def _shipped_weights() -> list[str]:
    folder = files("lora_plugins.tasks") / "weights"
    return [Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".safetensors")]


def _read_packaged(name: str) -> dict[str, Tensor]:
    if name in INSTALLED:
        return INSTALLED[name].renamed(_read_file(installed_file(name)))
    if name not in _shipped_weights():
        raise unknown("packaged weights", name, packaged_weights())
    with as_file(files("lora_plugins.tasks") / "weights" / f"{name}.safetensors") as path:
        return _read_file(path)


def _not_found(weights: str, path: Path) -> WeightsError:
    hint = unknown("weights", weights, (NONE, PRETRAINED, *(PACKAGE + name for name in packaged_weights())))
    return WeightsError(f"There is no file {path}. {hint} The path of a safetensors file or of a folder is fine too.")


def _read_file(path: Path) -> dict[str, Tensor]:
    state = _read_pickled(path) if path.suffix in PICKLED else _read_safetensors(path)
    for prefix in (DISTRIBUTED_PREFIX, TASK_PREFIX):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a safetensors file ({error}). Write one with safetensors.torch.save_file(state_dict, path)."
        ) from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """A file of `torch.save`: a state dict, or a dictionary that holds one."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise WeightsError(
            f"{path} holds no plain tensors ({reason}). Only those are read, as anything else could run code. Write "
            "them with safetensors.torch.save_file(state_dict, path)."
        ) from error
    inner = [loaded[name] for name in STATE_DICTS if isinstance(loaded, Mapping) and name in loaded]
    state = inner[0] if inner and isinstance(inner[0], Mapping) else loaded
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is no state dict: it holds other things than tensors by name.")
    return dict(state)
