"""The commands that go on with the model of a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer

from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks.training import VisionTask

PROGRAM = "lora-plugins"
RANDOM = "none"
"""`weights` of a network that starts at random."""


def next_steps(trainer: Trainer, task: VisionTask, callbacks: Sequence[LoraCallback]) -> dict[str, str]:
    """Commands that can be pasted, by what they do; none if the run left no file that can be loaded."""
    path = _file(trainer, task, callbacks)
    if path is None:
        return {}
    model, absolute = shlex.quote(str(path)), path.resolve()
    return {
        f"In {Path.cwd()}, predict for a folder of images": f"{PROGRAM} predict {model} IMAGES --out OUT",
        "Write it for other runtimes": f"{PROGRAM} export {model} model.onnx",
        "Go on in Python": (
            f"from lora_plugins.tasks import load_task\n\ntask = load_task({str(absolute)!r})\nprint(task.class_names)"
        ),
    }


def _file(trainer: Trainer, task: VisionTask, callbacks: Sequence[LoraCallback]) -> Path | None:
    """The smallest file that the run left and `load_task` takes: an adapter, a merged model, a checkpoint.

    Adapters, and checkpoints of a `LoraCallback`, need the base that they are of: random weights cannot be had again.
    """
    merged = [callback.export_to for callback in callbacks]
    checkpoint = cast(Any, trainer).checkpoint_callback
    stored = [getattr(checkpoint, name, None) for name in ("best_model_path", "last_model_path")]
    if callbacks and task.model_config.weights == RANDOM:
        found: list[str | None] = [*merged]
    else:
        adapters = [file.path for callback in callbacks for file in callback.adapter_files if file.is_ours]
        found = [*adapters, *merged, *stored]
    return next((Path(path) for path in found if path), None)
