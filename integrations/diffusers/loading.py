"""Pipelines by name or folder."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lora_plugins import ConfigError
from lora_plugins.integrations.diffusers.families import family_of

INDEX = "model_index.json"


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32, *, revision: str | None = None) -> Any:
    """Loads a text-to-image pipeline of a supported family.

    Args:
        model: A folder that a pipeline's `save_pretrained` wrote, or a name on the Hugging Face Hub.
        dtype: The type of its weights.
        revision: The branch, tag or commit on the Hub; a folder has none.

    Returns:
        The pipeline, with its progress bar off.

    Raises:
        ConfigError: If there is no such pipeline, or it is of a kind that is not served, or diffusers is not installed;
            or for a revision of a folder.
    """
    DiffusionPipeline: Any = _diffusers().DiffusionPipeline
    folder = Path(model)
    if folder.exists() and not (folder / INDEX).is_file():
        raise ConfigError(f"{folder} has no {INDEX}: it is no pipeline. Give the folder that save_pretrained wrote.")
    if folder.exists() and revision is not None:
        raise ConfigError(f"revision is {revision!r}, and {folder} is a folder, of which there is one. Leave it out.")
    if not folder.exists() and (str(model).count("/") != 1 or str(model).startswith((".", "/"))):
        raise ConfigError(
            f"There is no folder {folder.absolute()}, and {str(model)!r} is no name on the Hub, such as owner/name."
        )
    try:
        index = DiffusionPipeline.load_config(str(model), revision=revision)
        family_of(str(index.get("_class_name")))  # before weights are read
        pipe = DiffusionPipeline.from_pretrained(str(model), dtype=dtype, revision=revision)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"The pipeline {str(model)!r} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _diffusers() -> Any:
    """The library, which is heavy, and without types."""
    try:
        return import_module("diffusers")
    except ModuleNotFoundError as error:
        raise ConfigError(f"Pipelines need {error.name}. Run: pip install 'lora-plugins[diffusion]'") from error
