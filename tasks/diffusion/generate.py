"""`lora-plugins generate`: pictures from a pipeline and adapters, a checkpoint, or a merged pipeline."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lora_plugins import ConfigError, LoraModel
from lora_plugins.adapter import model_state
from lora_plugins.devices import usable_device
from lora_plugins.errors import AdapterFileError, counted
from lora_plugins.files import MANIFEST, format_of
from lora_plugins.hub import located
from lora_plugins.integrations.diffusers import LoraPipeline, Sampling, contact_sheet, load_pipeline, parts_of
from lora_plugins.integrations.lightning.checkpoint import read_checkpoint
from lora_plugins.tasks.diffusion.objectives import AUTO, predicted_by, take_prediction
from lora_plugins.tasks.diffusion.packaged import pipeline_source
from lora_plugins.tasks.diffusion.picture_rows import sample_rows
from lora_plugins.tasks.diffusion.text_to_image import DTYPES, TextToImageTask
from lora_plugins.tasks.errors import WeightsError, unknown
from lora_plugins.tasks.files import as_png
from lora_plugins.tasks.training import PROVENANCE_KEY, task_of_checkpoint
from lora_plugins.utils import replace_file
from lora_plugins.writable import check_writable_folder

SHEET = "sheet.png"


def main(given: Namespace) -> int:
    """Draws, and writes pictures and a contact sheet; returns the exit code.

    Raises:
        ConfigError: For arguments that do not go together, or a pipeline that is not served.
        AdapterFileError: For an adapter that is damaged or of another base.
        WeightsError: For a checkpoint that is none of ours.
    """
    _check(given)
    sampling = Sampling(
        steps=given.steps,
        guidance=given.guidance,
        height=given.height,
        width=given.width,
        negative_prompt=given.negative_prompt,
        batch_size=given.batch_size,
    )
    device = usable_device(given.device, "--device")
    pipe = _from_checkpoint(given.checkpoint, given.dtype) if given.checkpoint else _from_adapters(given)
    pipe.to(device)
    rows: dict[str, list[Image]] = {}
    for label in ("base", "adapter") if given.compare else ("",):
        with _base(pipe) if label == "base" else nullcontext():
            rows |= _drawn(pipe, given, sampling, label)
    _write(given.out, rows, given.seed)
    return 0


def _check(given: Namespace) -> None:
    """Checks the arguments before anything is loaded."""
    if any(not prompt.strip() for prompt in given.prompt):
        raise ConfigError("A prompt is empty. Say what is to be seen.")
    if given.dtype is not None and given.dtype not in DTYPES:
        raise unknown("dtype", given.dtype, DTYPES)
    if given.checkpoint and (given.model or given.adapter):
        raise ConfigError("A checkpoint has its model and its adapter: leave out --model and --adapter.")
    if given.weight is not None and len(given.weight) != len(given.adapter):
        raise ConfigError(
            f"{counted(len(given.adapter), 'adapter')} and {counted(len(given.weight), 'weight')} are given: give one "
            "--weight for each --adapter, in their order."
        )
    if given.compare and not (given.checkpoint or given.adapter):
        raise ConfigError("--compare shows a pipeline without and with adapters, and there is none: give --adapter.")
    check_writable_folder(given.out, "--out")


def _from_adapters(given: Namespace) -> Any:
    """A pipeline with adapters, all of them active."""
    paths = [located(path) for path in given.adapter]
    for path in paths:
        format_of(path)
    tasks = [_task_of(path / MANIFEST) for path in paths]
    said = [arguments for _, arguments in tasks]
    model, revision = (given.model, None) if given.model else _base_of(tasks)
    pipe = load_pipeline(pipeline_source(model), DTYPES[given.dtype or "float32"], revision=revision)
    take_prediction(pipe, _prediction_of(said, pipe.scheduler))
    names = [f"adapter{number}" for number in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        try:
            LoraPipeline.load_adapter(pipe, path, name)
        except AdapterFileError as error:
            if len(paths) > 1 and str(path) not in str(error):
                error.add_note(f"The adapter is {path}.")
            raise
    if names:
        LoraPipeline(pipe).set_adapter(names, weights=given.weight, trainable=False)
    return pipe


def _base_of(tasks: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, str | None]:
    """The pipeline that adapters of our own were trained on, as their folders say, and its revision."""
    found = {(said["model"], said.get("revision")) for _, said in tasks if said}
    if len(found) == 1:
        return found.pop()
    names = sorted(f"{model}@{revision}" if revision else model for model, revision in found)
    reason = f"the adapters were trained on {' and '.join(names)}" if found else "no adapter says which it is of"
    of_others = sorted({task for task, said in tasks if task and not said})
    if of_others:
        reason += f"; one was trained by {' and one by '.join(of_others)}, which names no pipeline"
    raise ConfigError(f"It is not known which pipeline is meant: {reason}. Give --model.")


def _prediction_of(said: Sequence[Mapping[str, Any]], scheduler: Any) -> str:
    """What adapters of our own were trained to predict; those of other programs do not say it."""
    found = {predicted_by(scheduler, each.get("prediction", AUTO)) for each in said if each}
    if len(found) > 1:
        raise ConfigError(
            f"The adapters were trained to predict {' and '.join(sorted(found))} (`prediction`, where `auto` is what "
            "the pipeline says), and a pipeline draws with one of them. Draw with each by itself."
        )
    return found.pop() if found else AUTO


def _task_of(manifest: Path) -> tuple[str, Mapping[str, Any]]:
    """The task that trained an adapter and its arguments, if the folder says them and they name a pipeline."""
    try:
        provenance = json.loads(manifest.read_text(encoding="utf-8"))[PROVENANCE_KEY]
        task, arguments = str(provenance["class"]).rpartition(".")[2], provenance["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return "", {}
    names_pipeline = isinstance(arguments, dict) and isinstance(arguments.get("model"), str)
    return task, arguments if names_pipeline else {}


def _from_checkpoint(path: str, dtype: str | None) -> Any:
    if not Path(path).is_file():
        raise WeightsError(f"There is no checkpoint {path}.")
    checkpoint = read_checkpoint(Path(path))
    said = checkpoint.get(PROVENANCE_KEY)
    own = f"{TextToImageTask.__module__}.{TextToImageTask.__qualname__}"
    if not isinstance(said, dict) or said.get("class") != own:
        raise WeightsError(f"{path} is no checkpoint of a TextToImageTask.")
    changed: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return task_of_checkpoint(TextToImageTask, checkpoint, **changed).pipe


def _base(pipe: Any) -> AbstractContextManager[Any]:
    parts = parts_of(pipe)
    if model_state(parts) is None:
        raise ConfigError("--compare shows a pipeline without and with adapters, and the checkpoint has none.")
    return LoraModel(parts).disable_adapter()


def _drawn(pipe: Any, given: Namespace, sampling: Sampling, label: str) -> dict[str, list[Image]]:
    rows = sample_rows(pipe, given.prompt, given.pictures, sampling, given.seed)
    names = [f"{label} {number}: {prompt}".lstrip() for number, prompt in enumerate(given.prompt, 1)]
    return dict(zip(names, rows, strict=True))


def _write(folder: Path, rows: dict[str, list[Image]], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pictures in rows.items():
        stem = name.partition(":")[0].replace(" ", "-")
        for number, picture in enumerate(pictures):
            replace_file(folder / f"{stem}-seed-{seed + number}.png", as_png(picture))
    replace_file(folder / SHEET, as_png(contact_sheet(rows)))
    print(f"{counted(sum(map(len, rows.values())), 'picture')} and {SHEET} in {folder}")
