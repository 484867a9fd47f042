"""The commands that go on with the model of a run."""

import shlex
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer

from lora_plugins.integrations.lightning.callback import lora_callbacks
from lora_plugins.integrations.lightning.checkpoint import written_by
from lora_plugins.tasks.command_lines import lacking_for_onnx
from lora_plugins.tasks.models import NONE, ModelConfig

PROGRAM = "lora-plugins"


def next_steps(trainer: Trainer, config: ModelConfig) -> dict[str, str]:
    """Commands that can be pasted, and lines of Python, by what they do; none if the run left nothing to load."""
    path = _file(trainer, config)
    if path is None:
        return {}
    lines = f"from lora_plugins.tasks import load_task\n\ntask = load_task({str(path.resolve())!r})"
    return {**next_commands(trainer, config), "Go on in Python": f"{lines}\nprint(task.class_names)"}


def next_commands(trainer: Trainer, config: ModelConfig) -> dict[str, str]:
    """Commands that can be pasted, by what they do; none if the run left no file that can be loaded."""
    path = _file(trainer, config)
    if path is None:
        return {}
    model = shlex.quote(str(path))
    kind = ".pt2" if lacking_for_onnx() else ".onnx"
    return {
        f"In {Path.cwd()}, predict for a folder of images": f"{PROGRAM} predict {model} IMAGES --out OUT",
        "Write it for other runtimes": f"{PROGRAM} export {model} model{kind}",
    }


def note_on_the_base(trainer: Trainer, config: ModelConfig) -> str | None:
    """What to say when training starts, if its adapter will be of no use; it is for a base that is in no file."""
    callbacks = lora_callbacks(trainer)
    leaves_adapters, leaves_all = any(c.adapter_files for c in callbacks), any(c.export_to for c in callbacks)
    if config.weights != NONE or not leaves_adapters or leaves_all:
        return None
    return (
        "note: the network starts at random (weights: none), and its adapter fits no other. Let export_to of the "
        "LoraCallback write the merged network as well, or take weights that are in a file."
    )


def _file(trainer: Trainer, config: ModelConfig) -> Path | None:
    """The smallest file that the run left and `load_task` takes: an adapter, a merged model, a checkpoint.

    Adapters, and checkpoints of a `LoraCallback`, need the base that they are of: random weights cannot be had again.
    """
    run = cast(Any, trainer)  # whose types lack some attributes
    callbacks = lora_callbacks(trainer)
    merged, stored = [callback.export_to for callback in callbacks], written_by([run.checkpoint_callback])
    if callbacks and config.weights == NONE:
        found: list[str | None] = [*merged]
    else:
        adapters = [file.path for callback in callbacks for file in callback.adapter_files if file.is_ours]
        found = [*adapters, *merged, *stored]
    return next((Path(path) for path in found if path), None)
