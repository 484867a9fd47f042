"""Loads a task from the files of a fit: a checkpoint, an adapter folder, or a merged safetensors file.

A merged file and a checkpoint without adapters hold all weights, and nothing is read of their base.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from lora_plugins import LoraModel
from lora_plugins.errors import ConfigError, LoraError, sentence
from lora_plugins.field_checks import Check, check_fields, check_share, choice_of, optional
from lora_plugins.files import MANIFEST
from lora_plugins.integrations.lightning.checkpoint import KEY, read_checkpoint
from lora_plugins.integrations.lightning.module import adapted_targets
from lora_plugins.merge import DEFAULT_MAX_ERROR
from lora_plugins.tasks.argument_checks import check_path, check_size
from lora_plugins.tasks.command_lines import check_model
from lora_plugins.tasks.data import INTERPOLATIONS
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.file_kinds import SAFETENSORS, WEIGHTS_FILES
from lora_plugins.tasks.models import AUTO, NONE
from lora_plugins.tasks.segmentation import SemanticSegmentationTask
from lora_plugins.tasks.training import METADATA_KEY, PROVENANCE_KEY, Provenance, VisionTask, task_of_checkpoint

_OF_ANY_TASK = frozenset({"class", "arguments"})
"""What files say of any task."""

REQUIRED = _OF_ANY_TASK | {"image_size", "interpolation", "mean", "std", "bgr"}
"""What files say of a task that predicts labels or masks."""

_OF_IMAGES: Mapping[str, Check] = {"image_size": optional(check_size), "interpolation": choice_of(*INTERPOLATIONS)}
"""What is read without building anything, and so said to be wrong by nothing else."""


def load_task(path: str | Path, weights: str | Path | None = None) -> VisionTask:
    """Loads a task with its weights, ready to predict.

    Args:
        path: A checkpoint (`.ckpt`), an adapter folder, or a merged file (`.ckpt`, `.safetensors`) of one of our tasks.
            The base of an adapter, in a checkpoint or a folder, is read from where the task had it from.
        weights: Where that is now, if it was moved since.

    Returns:
        The task in eval mode; its `image_size` and `interpolation` are those that it was trained with.

    Raises:
        WeightsError: If there is no such file, or if it has no provenance, or one that cannot be built.
        AdapterFileError: If an adapter does not fit its base.
        ConfigError: If `weights` are given for a file that has no adapter.
    """
    check_path("path", path)
    optional(check_path)("weights", weights)
    path = Path(path)
    check_model(path)
    with _building(path):
        return _load(path, weights)


def load_base(path: str | Path, weights: str | Path | None = None) -> nn.Module:
    """Builds what an adapter folder of one of our tasks goes onto, with the weights of the base.

    `lora-plugins convert FOLDER TARGET --to peft --model lora_plugins.tasks:load_base FOLDER` needs it.

    Args:
        path: The folder.
        weights: Where the base is now, if it was moved since.

    Returns:
        The module of the task that is adapted, its network unless the callback had another target, in eval mode.

    Raises:
        WeightsError: If there is no such folder, or if it has no provenance, or one that cannot be built.
    """
    check_path("path", path)
    optional(check_path)("weights", weights)
    path = Path(path)
    with _building(path):
        source = task_of_adapter(path)
        return source.target_in(source.build(weights).eval())


def _load(path: Path, weights: str | Path | None) -> VisionTask:
    if path.is_dir():
        source = task_of_adapter(path)
        provenance, task = source.provenance, source.build(weights)
        LoraModel.load_adapter(source.target_in(task), path)
    elif path.suffix == SAFETENSORS:
        provenance = _checked(_metadata(path), path)
        _check_needed(weights, path)
        model = _whole(provenance, str(path))
        task = _task_class(provenance, path)(**{**provenance["arguments"], "model": model})
    else:
        checkpoint = read_checkpoint(path)
        provenance = _checked(checkpoint.get(PROVENANCE_KEY), path)
        adapted = KEY in checkpoint
        if not adapted:
            _check_needed(weights, path)
        model = _arguments(provenance, weights)["model"] if adapted else _whole(provenance, NONE)
        task = task_of_checkpoint(_task_class(provenance, path), checkpoint, model=model)
        if not adapted:  # an adapter that is trained on it has this base
            task.model_config = replace(task.model_config, weights=str(path))
            task.hparams["model"] = asdict(task.model_config)
    task.adopt_images(provenance)
    return task.eval()


def _check_needed(weights: str | Path | None, path: Path) -> None:
    if weights is not None:
        raise ConfigError(
            f"weights (--weights) is {weights}, which would not be read: it is the base of an adapter, and {path} "
            "holds all weights itself. Leave it out."
        )


@dataclass(frozen=True)
class AdapterTask:
    """The task that an adapter folder is of."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def provenance(self) -> Provenance:
        """What the manifest says of the task."""
        provenance: Provenance = self.manifest[PROVENANCE_KEY]
        return provenance

    @property
    def has_masks(self) -> bool:
        """Whether it predicts masks, not labels.

        Raises:
            WeightsError: If its class is not imported, or is not of this version.
        """
        return issubclass(_task_class(self.provenance, self.path), SemanticSegmentationTask)

    def build(self, weights: str | Path | None = None) -> VisionTask:
        """Builds the task with its base, without the adapter; `weights` is where those of the base are now."""
        with _building(self.path):
            if weights is None and self.provenance["arguments"]["model"]["weights"] == NONE:
                raise WeightsError(
                    f"The base of {self.path} was random (weights: none) and is in no file. The merged file of its "
                    "run, export_to of the LoraCallback, would hold all; or train on weights that are in a file."
                )
            return _task_class(self.provenance, self.path)(**_arguments(self.provenance, weights))

    def target_in(self, task: VisionTask) -> nn.Module:
        """Returns the module of the task that the adapter goes onto."""
        return task.get_submodule(self.provenance.get("target") or "")


def task_of_adapter(path: Path) -> AdapterTask:
    """Reads which task an adapter folder is of.

    Raises:
        WeightsError: If it is none, or does not say.
    """
    check_model(path)
    manifest = _manifest(path / MANIFEST)
    _checked(manifest.get(PROVENANCE_KEY), path)
    return AdapterTask(path, manifest)


def merged_task(
    path: str | Path, weights: str | Path | None = None, *, max_error: float = DEFAULT_MAX_ERROR
) -> VisionTask:
    """As `load_task`, with the adapters merged, so that all layers are plain.

    Args:
        path: As in `load_task`.
        weights: Likewise.
        max_error: Share of an update that rounding may lose, as in `LoraModel.merge_and_unload`.

    Raises:
        ConfigError: If `max_error` is no number of at least 0.
        WeightsError: As `load_task` does.
        AdapterFileError: Likewise.
        MergeError: If rounding would lose more.
    """
    check_share("max_error", max_error)
    task = load_task(path, weights)
    for module in adapted_targets(task).values():
        LoraModel(module).merge_and_unload(max_error=max_error, dequantize=True)
    return task


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """Names the file from which no task can be built: edited by hand, or of another version."""
    try:
        yield
    except LoraError:
        raise
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} says of its task what cannot be built, {type(error).__name__}: {sentence(error)} It was edited, "
            "or is of another version. Take what its run has written, with the version that the run had."
        ) from error


def _arguments(provenance: Provenance, weights: str | Path | None) -> dict[str, Any]:
    """The arguments of the task, with the weights of its base where they are now."""
    arguments = dict(provenance["arguments"])
    base = str(arguments["model"]["weights"] if weights is None else weights)
    is_path = os.sep in base or Path(base).suffix in WEIGHTS_FILES
    if is_path and not Path(base).exists():
        raise WeightsError(
            f"The weights of the base are {'no more ' if weights is None else 'not '}in {base}. Say where they are: "
            "--weights FILE, or load_task(path, weights). The merged file of a run needs none."
        )
    return arguments | {"model": _model(provenance, weights=base)}


def _whole(provenance: Provenance, weights: str) -> dict[str, Any]:
    """The model of a file that holds all weights, its head among them."""
    return _model(provenance, weights=weights, head=AUTO)


def _model(provenance: Provenance, **changes: str) -> dict[str, Any]:
    """The model with the `mean` and `std` of its training, whatever its files, or its library, say by now."""
    said = {key: provenance[key] for key in ("mean", "std")}
    return {**provenance["arguments"]["model"], **said, **changes}


def _checked(provenance: Any, path: Path) -> Provenance:
    if isinstance(provenance, Mapping) and provenance.keys() & REQUIRED == _OF_ANY_TASK:
        raise WeightsError(
            f"{path} is of {provenance['class']}, which predicts no labels and no masks. If it is a TextToImageTask, "
            "draw pictures with lora-plugins generate."
        )
    if not isinstance(provenance, Mapping) or not provenance.keys() >= REQUIRED:
        raise WeightsError(
            f"{path} does not say which task it is of. Files that a task's fit has written do: a checkpoint, or what "
            "`save_adapter_to` and `export_to` of the LoraCallback name."
        )
    try:
        check_fields(provenance, _OF_IMAGES)
    except ConfigError as error:
        raise WeightsError(f"{path} was edited, or is of another version: its {error}") from error
    return provenance


def _task_class(provenance: Provenance, path: Path) -> type[VisionTask]:
    """The class: ours, or of a module that is imported already, since a file must not choose what is imported."""
    module, _, name = str(provenance["class"]).rpartition(".")
    own = module.startswith("lora_plugins.tasks.")
    try:
        cls = getattr(importlib.import_module(module) if own else sys.modules.get(module), name, None)
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{path} is of the task {provenance['class']}, which cannot be imported here: {sentence(error)} Load it "
            "with the version that its run had."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, VisionTask)):
        raise WeightsError(
            f"{path} is of the task {provenance['class']}, which is not imported. Import it, and load again."
        )
    return cls


def _manifest(path: Path) -> Mapping[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    return manifest if isinstance(manifest, Mapping) else {}


def _metadata(path: Path) -> Any:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error
