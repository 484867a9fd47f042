"""Predicts labels or masks for images: `lora-plugins predict MODEL IMAGES... --out OUT`.

MODEL is a checkpoint, an adapter folder or a merged file of a task; IMAGES are images, folders of images, or patterns
such as `"photos/*/*.jpg"`. A classifier writes `OUT/labels.csv`, a segmenter `OUT/masks/NAME.png`, 8-bit indices with a
palette, and `OUT/overlays/NAME.png`. NAME is the path below the folder that all images are in.
"""

import csv
import io
import math
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from lora_plugins.devices import usable_device
from lora_plugins.errors import ConfigError, counted
from lora_plugins.field_checks import Check, check_fields, check_flag, choice_of, number_from, optional
from lora_plugins.tasks.argument_checks import check_path, check_paths, check_size, instance_of
from lora_plugins.tasks.data import ERROR, PROBLEM_POLICIES, SKIP, Size
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import as_png, left_out, one_left_out, read_image
from lora_plugins.tasks.inference.given_images import given_images
from lora_plugins.tasks.inference.loading import load_task
from lora_plugins.tasks.inference.probabilities import OVERLAP, label_probabilities, mask_labels
from lora_plugins.tasks.segmentation import MAX_CLASSES, SemanticSegmentationTask, class_colors, overlay, palette_image
from lora_plugins.tasks.training import VisionTask
from lora_plugins.utils import put_files, remove_leftovers, replace_file
from lora_plugins.writable import check_writable_folder

LABELS, MASKS, OVERLAYS = "labels.csv", "masks", "overlays"
COLUMNS = ("image", "label", "probability")
"""What the table of labels begins with; a list of true labels, which may have its name, has no probabilities."""

MAX_TOLD = 5

_CHECKS: Mapping[str, Check] = {
    "task": instance_of(VisionTask),
    "images": check_paths,
    "out": check_path,
    "window": optional(check_size),
    "overlap": number_from(-math.inf),
    "flips": check_flag,
    "on_problem": choice_of(*PROBLEM_POLICIES),
}
"""What the arguments of `predict_folder` can be; the range of `overlap` is checked by whoever takes it."""


def predict_folder(
    task: VisionTask,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    window: Size | None = None,
    overlap: float = OVERLAP,
    flips: bool = False,
    on_problem: str = ERROR,
) -> list[Path]:
    """Predicts for images on disk, and writes the predictions.

    Args:
        task: The task, in eval mode.
        images: An image, a folder of images, or a pattern of paths, or several of these; the images are of any size.
        out: The folder to write into; it is created.
        window: For segmentation, see `mask_probabilities`.
        overlap: Likewise.
        flips: Whether to average over each image and its mirror image.
        on_problem: What happens to images that cannot be read: `error` stops, before anything is written, with a list
            of them, `skip` leaves them out with a warning that lists them.

    Returns:
        The written files.

    Raises:
        DataError: If there are no images, some cannot be read, or the task has too many classes for a palette.
        ConfigError: For a window without masks, another wrong option, or a folder that cannot be written into, or
            has files of the names of results that are none.
    """
    given = {"task": task, "images": images, "out": out, "window": window, "overlap": overlap, "flips": flips}
    check_fields({**given, "on_problem": on_problem}, _CHECKS)
    out = Path(out)
    check_writable_folder(out, "The folder of results")
    if window is not None and not isinstance(task, SemanticSegmentationTask):
        raise ConfigError(f"A window is for masks; {type(task).__name__} predicts labels.")
    if isinstance(task, SemanticSegmentationTask):
        predict = partial(mask_labels, task, window=window, overlap=overlap, flips=flips)
        return _write_masks(task, given_images(images, on_problem), out, predict)
    return [_write_labels(task, given_images(images, on_problem, task.image_size), out / LABELS, flips)]


def main(given: Namespace) -> int:
    """Runs the command; returns the exit code.

    Raises:
        LoraError: As `predict_folder` and `load_task` do, and for an overlap without a window.
    """
    if given.overlap is not None and given.window is None:
        raise ConfigError("--overlap is that of windows. Say --window HEIGHT WIDTH too, or leave it out.")
    device = usable_device(given.device, "--device")
    files = predict_folder(
        load_task(given.model, given.weights).to(device),
        given.images,
        given.out,
        window=given.window,
        overlap=OVERLAP if given.overlap is None else given.overlap,
        flips=given.flips,
        on_problem=SKIP if given.skip else ERROR,
    )
    print(_told(files, given.out))
    unread = left_out(folder for folder in map(Path, given.images) if folder.is_dir())
    if unread:
        print(f"Left out: {len(unread)}, such as {one_left_out(unread)}")
    return 0


def _told(files: Sequence[Path], out: Path) -> str:
    """Says what was written, and where."""
    if files[0] == out / LABELS:
        with files[0].open(newline="", encoding="utf-8") as stream:
            labels = Counter(label for _, label, *_ in islice(csv.reader(stream), 1, None))
        counts = ", ".join(f"{count} {name}" for name, count in labels.most_common(MAX_TOLD))
        more = f", and {len(labels) - MAX_TOLD} more" if len(labels) > MAX_TOLD else ""
        return f"Labels of {counted(labels.total(), 'image')} with probabilities: {files[0]} ({counts}{more})"
    masks = [file for file in files if file.is_relative_to(out / MASKS)]
    return f"Masks of {counted(len(masks), 'image')}: {out / MASKS}, and over the images: {out / OVERLAYS}"


def _write_labels(task: VisionTask, paths: Mapping[str, Path], file: Path, flips: bool) -> Path:
    if file.exists() and not file.read_bytes().startswith(",".join(COLUMNS).encode()):
        raise _of_another(file)
    names, table = task.class_labels, io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerow([*COLUMNS, *(f"probability of {name}" if name in COLUMNS else name for name in names)])
    for name, path in paths.items():
        probabilities = label_probabilities(task, _tensor(path, task.image_size), flips=flips)
        best = int(probabilities.argmax())
        columns = (f"{float(p):.6f}" for p in (probabilities[best], *probabilities))
        rows.writerow([name, names[best], *columns])
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, table.getvalue().encode())  # whole or not at all
    return file


def _write_masks(
    task: SemanticSegmentationTask, paths: Mapping[str, Path], out: Path, predict: Callable[[Tensor], Tensor]
) -> list[Path]:
    classes = task.model_config.num_classes
    if classes > MAX_CLASSES:
        raise DataError(f"The task has {classes} classes; an 8-bit mask holds at most {MAX_CLASSES}.")
    colors, written = class_colors(classes), []
    names = _names_of_masks(paths)
    for name in names.values():
        if (out / MASKS / name).exists() and not (out / OVERLAYS / name).exists():
            raise _of_another(out / MASKS / name)
    for given, path in paths.items():
        name, image = names[given], _tensor(path)
        mask = predict(image).numpy()
        pixels = image.permute(1, 2, 0).numpy()
        outputs = {  # the mask last: where it is and nothing over the image, another program wrote it
            OVERLAYS: Image.fromarray(overlay(pixels, mask, colors, task.ignore_index)),
            MASKS: palette_image(mask, colors),
        }
        for folder, output in outputs.items():
            file = out / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            put_files({file: as_png(output)})
            written.append(file)
    for place in {file.parent for file in written}:
        remove_leftovers(place, re.compile(r".*\.png"))
    return written


def _names_of_masks(paths: Iterable[str]) -> dict[str, str]:
    """The files of images, which have their endings only where they would be the same without."""
    stems = {name: str(Path(name).with_suffix("")) for name in paths}
    counts = Counter(stems.values())
    return {name: f"{stem if counts[stem] == 1 and stem not in stems else name}.png" for name, stem in stems.items()}


def _of_another(file: Path) -> ConfigError:
    return ConfigError(
        f"{file} is there already, and is no prediction: it may be what is true, and would be replaced. Name another "
        "folder: --out DIR."
    )


def _tensor(path: Path, resized_to: Size | None = None) -> Tensor:
    """An image (3, H, W), 8-bit."""
    pixels: Tensor = functional.pil_to_tensor(read_image(path, resized_to))
    return pixels
