"""Loads adapter-only checkpoints without a Trainer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch import LightningModule

from lora_plugins import AdapterFileError
from lora_plugins.integrations.lightning.checkpoint.attribute_dicts import HYPERPARAMETERS
from lora_plugins.integrations.lightning.checkpoint.entry import KEY, checked_entry
from lora_plugins.integrations.lightning.checkpoint.late_layers import (
    before_hook,
    build_missing,
    missing_layers,
    without_base,
)
from lora_plugins.integrations.lightning.checkpoint.objects import Global, allowed
from lora_plugins.integrations.lightning.checkpoint.reading import read_checkpoint
from lora_plugins.integrations.lightning.checkpoint.rebuilding import check_arguments, original
from lora_plugins.integrations.lightning.checkpoint.restoring import restore
from lora_plugins.names import MANIFEST
from lora_plugins.utils import replace_torch_file

Module = TypeVar("Module", bound=LightningModule)

_CLASS_PATH = "_class_path"
"""The hyperparameter in which Lightning's command line keeps the path of the class."""


class LoraCheckpointMixin(LightningModule):
    """Lets `YourModule.load_from_checkpoint(path)` load adapter-only checkpoints.

    Name it before the other base classes of the module's class. The module is built first, with its own pretrained
    base; then the adapters of the file are attached to it. Checkpoints without adapters load as usual.
    """

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a checkpoint with or without adapters; see `LightningModule.load_from_checkpoint`."""
        options = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, **kwargs}
        return _load(cls, super().load_from_checkpoint, checkpoint_path, weights_only, options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the adapters onto the module and completes the state dict with the module's own base.

        Raises:
            AdapterFileError: If the adapters do not fit the module.
        """
        _put_on(self, super().on_load_checkpoint, checkpoint)


def load_from_checkpoint(
    module_class: type[Module],
    path: str | Path,
    *,
    map_location: Any = "cpu",
    allow_globals: Sequence[Global] = (),
    weights_only: bool = True,
    **kwargs: Any,
) -> Module:
    """Loads an adapter-only checkpoint of any LightningModule class.

    Args:
        module_class: The class, or one that it inherits from if the checkpoint names its class (those that the command
            line wrote do).
        path: The checkpoint.
        map_location: Where to put the tensors, as in `torch.load`.
        allow_globals: Classes and functions that hyperparameters in the file may be, such as an Enum: themselves, or
            their import paths. Nothing else is unpickled.
        weights_only: False unpickles whatever the file has, which may run any code: only for files of those you trust.
        **kwargs: Arguments of the class that the checkpoint does not know or that are to be replaced.

    Returns:
        The module, adapted and in its own class, with its adapters active. `LoraModel(module)` is a handle to them.

    Raises:
        AdapterFileError: If the file is damaged, holds no adapter or objects that are not allowed, or was made for
            another base; or if the class needs an argument that neither the file nor `kwargs` have.
        ConfigError: If what is allowed cannot be imported, or the class does not take one of `kwargs`.
    """
    checkpoint = read_checkpoint(path, map_location, allow_globals, weights_only=weights_only)
    if KEY not in checkpoint:
        raise AdapterFileError(
            f"{path} holds no adapter of lora_plugins. A plain checkpoint is loaded by "
            f"{module_class.__name__}.load_from_checkpoint."
        )
    checked_entry(checkpoint)
    real = _named_class(checkpoint, module_class)
    check_arguments(real, checkpoint, kwargs)
    loading = real if issubclass(real, LoraCheckpointMixin) else _loading_class(real)
    arguments = checkpoint.get(HYPERPARAMETERS, {})
    with TemporaryDirectory() as folder, _importable(loading) as class_path:
        if _CLASS_PATH in arguments:
            arguments[_CLASS_PATH] = class_path
        written = _write(checkpoint, Path(folder))
        # Objects in it are those that were just read as allowed ones.
        module: Module = loading.load_from_checkpoint(written, map_location=map_location, weights_only=False, **kwargs)
    module.__class__ = real
    return module


def _loading_class(real: Any) -> Any:
    """Returns a class that loads as one with the mixin does, whose modules can be given the real one.

    With the mixin as a base beside it, Python could refuse that: a class whose first base has no __dict__, as `ABC` and
    `Generic`, would have another layout.
    """

    def load(cls: Any, /, path: Any, *, weights_only: bool, **options: Any) -> Any:
        return _load(real, super(loading, cls).load_from_checkpoint, path, weights_only, options)

    def put_on(module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _put_on(module, super(loading, module).on_load_checkpoint, checkpoint)

    own = {"__module__": real.__module__, "load_from_checkpoint": classmethod(load), "on_load_checkpoint": put_on}
    loading: Any = type(real.__name__, (real,), own)
    return loading


@contextmanager
def _importable(cls: type) -> Iterator[str]:
    """Gives a path under which a class is found, as long as it loads a checkpoint that names its class."""
    name = f"_{cls.__name__}_{id(cls)}"
    setattr(sys.modules[__name__], name, cls)
    try:
        yield f"{__name__}.{name}"
    finally:
        delattr(sys.modules[__name__], name)


def _load(
    cls: type[LightningModule],
    own: Callable[..., Module],
    path: Any,
    weights_only: bool | None,
    options: dict[str, Any],
) -> Module:
    """Loads a checkpoint by a class's own loader, which sees what its module wrote.

    Raises:
        AdapterFileError: If it is an adapter folder.
    """
    if isinstance(path, str | Path) and (Path(path) / MANIFEST).is_file():
        raise AdapterFileError(
            f"{path} is an adapter folder, and a checkpoint is a file. LoraModel.load_adapter(module, {str(path)!r}) "
            f"puts it on a {cls.__name__}."
        )
    with TemporaryDirectory() as folder:
        small = _as_written(path, Path(folder), weights_only=weights_only is not False)
        if _is_lightnings_own(cls):
            options["weights_only"] = weights_only if small is None else False
        return own(small or path, **options)


def _put_on(module: LightningModule, own: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
    """Puts the adapters of a checkpoint onto a module, around the module's own hook."""
    if KEY not in checkpoint:
        own(checkpoint)
        return
    if getattr(own, "__func__", None) is not LightningModule.on_load_checkpoint:
        _call_hook(module, own, checkpoint)
    build_missing(module, checkpoint)
    checkpoint.update(restore(module, without_base(checkpoint)))


def _call_hook(module: LightningModule, own: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
    """Calls a module's own hook as a Trainer does, which has put the adapters on, as far as there are layers."""
    restored = None
    if not missing_layers(module, checkpoint):
        with suppress(AdapterFileError):  # the hook may load the base
            restored = restore(module, without_base(checkpoint))
    complete, after = before_hook(module, checkpoint, restored)
    checkpoint.update(complete)
    own(checkpoint)
    after()


def _as_written(path: Any, folder: Path, *, weights_only: bool) -> Path | None:
    """Writes a small checkpoint again as its module wrote it, if it can be read.

    Returns:
        Where it is; None for any other checkpoint.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    try:
        with allowed():
            checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except Exception:  # Lightning says what is wrong with a file that is no checkpoint
        return None
    return _write(original(checkpoint), folder) if isinstance(checkpoint, dict) and KEY in checkpoint else None


def _write(checkpoint: dict[str, Any], folder: Path) -> Path:
    """Writes a checkpoint to a file, since a class with a loader of its own may read it more than once."""
    path = folder / "checkpoint.ckpt"
    replace_torch_file(path, checkpoint)
    return path


def _is_lightnings_own(cls: type[LightningModule]) -> bool:
    """Whether the class has Lightning's loader, which takes `weights_only`; others decide that for themselves."""
    owners = [each for each in cls.__mro__ if "load_from_checkpoint" in vars(each)]
    return next(each for each in owners if each is not LoraCheckpointMixin) is LightningModule


def _named_class(checkpoint: dict[str, Any], module_class: type[Module]) -> type[Module]:
    """Returns the class that the checkpoint names, which has to be imported already; without a name, `module_class`."""
    arguments = checkpoint.get(HYPERPARAMETERS, {})
    path = arguments.get(_CLASS_PATH)
    if path is None:
        return module_class
    module, _, name = str(path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, module_class)):
        raise AdapterFileError(
            f"The checkpoint was made from {path}, which is not an imported subclass of {module_class.__name__}. "
            "Import it and load from it."
        )
    return found
