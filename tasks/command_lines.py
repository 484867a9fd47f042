"""The arguments of the commands, apart from what they do: help and mistakes need not wait for what takes seconds."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lora_plugins import ConfigError
from lora_plugins.cli import Parser
from lora_plugins.errors import listing, no_folder, nothing_there
from lora_plugins.integrations.lightning.cli import MAX_ERROR, place, positive, share, whole
from lora_plugins.names import MANIFEST
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.file_kinds import SAFETENSORS, WEIGHTS_FILES, is_of_its_kind

ONNX = ".onnx"
WRITTEN = (".pt2", ONNX, SAFETENSORS)
"""Endings of what `export` writes."""

WRITES_ONNX = ("onnx", "onnxruntime", "onnxscript")
"""The packages that write such a file."""

LARGEST_PORT, LONGEST_WAIT, LARGEST_UPLOAD = 65535, 60_000, 1_000_000
"""What `serve` takes at most: milliseconds of a wait, and MiB of an upload."""

MOVED = "the weights of an adapter's base, if they are not where the training had them"


def predict_parser() -> Parser:
    """Those of `predict MODEL IMAGES`."""
    parser = Parser(
        prog="lora-plugins predict",
        description="Write labels (a CSV file with probabilities) or masks for images.",
        epilog="With flags alone, such as --config FILE, `predict` is the Trainer's: lora-plugins predict --help-all.",
    )
    parser.add_argument("model", help="a checkpoint, an adapter folder or a merged file of a task")
    parser.add_argument("images", nargs="+", help="images, folders of images, or patterns: 'photos/*/*.jpg'")
    parser.add_argument("--out", type=place, default="predicted", help="the folder to write into (default: predicted)")
    parser.add_argument("--window", type=whole, nargs=2, metavar=("HEIGHT", "WIDTH"), help="sliding window of masks")
    parser.add_argument("--overlap", type=float, help="share of a window that overlaps with the next (default: 0.25)")
    parser.add_argument("--flips", action="store_true", help="average over each image and its mirror image")
    parser.add_argument("--skip", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--weights", metavar="FILE", help=MOVED)
    parser.add_argument("--device", help="such as cuda:1; by default the GPU that torch finds, or else cpu")
    return parser


def check_model(path: str | Path) -> None:
    """Checks that there is something to load a task from.

    Raises:
        WeightsError: If there is not, or a folder without an adapter, with where one is inside, or a file of another
            kind.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(
            f"There is no {path}. Give a checkpoint, an adapter folder or a merged file. {nothing_there(path)}"
        )
    if path.is_file() and not is_of_its_kind(path):
        if path.suffix not in WEIGHTS_FILES:
            raise WeightsError(
                f"{path} is no model, which comes first: a checkpoint, an adapter folder or a merged file."
            )
        kind = "safetensors file" if path.suffix == SAFETENSORS else "checkpoint"
        raise WeightsError(f"{path} is no {kind}, or is cut off. Give the file that a fit has left.")
    if path.is_dir() and not (path / MANIFEST).exists():
        inside = sorted(str(each.parent) for each in path.glob(f"*/{MANIFEST}"))
        holds = f", but holds {'one' if len(inside) == 1 else 'some'}: {', '.join(inside)}." if inside else None
        raise WeightsError(f"{path} is no adapter folder{holds or f': it has no {MANIFEST}.'}")


def adapters_in(folder: str | Path) -> list[str]:
    """The names of the adapters in a folder that they are served from, sorted.

    Raises:
        WeightsError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise WeightsError(f"{no_folder(Path(folder))} Give one whose subfolders are adapter folders.")
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{MANIFEST}"))


def check_adapters(folder: str | Path) -> None:
    """Checks that there is something to serve.

    Raises:
        WeightsError: If there is not.
    """
    if not adapters_in(folder):
        raise WeightsError(
            f"There is no adapter in {folder}. Give a folder whose subfolders are adapter folders, such as train "
            "leaves in runs/NAME."
        )


def check_ending(out: str | Path) -> None:
    """Checks that a file is of a kind that is written.

    Raises:
        ConfigError: If it is not.
    """
    if Path(out).suffix not in WRITTEN:
        raise ConfigError(f"The file to write is {str(out)!r}. It ends in one of {', '.join(WRITTEN)}.")


def check_runtime(out: str | Path) -> None:
    """Checks that what writes a file of its kind is installed.

    Raises:
        ConfigError: If it is not, with the line that installs it.
    """
    if Path(out).suffix == ONNX and (lacking := lacking_for_onnx()):
        raise ConfigError(
            f"ONNX needs {listing(lacking)}. Run: pip install {' '.join(lacking)}. A .pt2 file needs nothing more."
        )


def lacking_for_onnx() -> list[str]:
    """The packages that write an ONNX file and are not installed; none of them is imported."""
    return [name for name in WRITES_ONNX if find_spec(name) is None]


def export_parser() -> Parser:
    """Those of `export MODEL OUT`."""
    parser = Parser(prog="lora-plugins export", description="Write a merged network for other runtimes.")
    parser.add_argument("model", help="a checkpoint, an adapter folder or a merged file of a task")
    parser.add_argument("out", type=place, help="the file to write: .onnx, .pt2, or .safetensors for the weights alone")
    parser.add_argument(
        "--size", type=whole, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images; by default as in training"
    )
    parser.add_argument("--weights", metavar="FILE", help=MOVED)
    parser.add_argument("--max-error", type=share, metavar="X", help=MAX_ERROR)
    return parser


def serve_parser() -> Parser:
    """Those of `serve ADAPTERS`."""
    parser = Parser(
        prog="lora-plugins serve",
        description="Answer images by adapters, which share one base in memory and are loaded when first asked for.",
    )
    parser.add_argument("adapters", help="a folder whose subfolders are adapter folders of tasks")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=_within(1, LARGEST_PORT, whole), default=8000)
    parser.add_argument("--loaded", type=whole, default=64, help="adapters in memory at a time")
    parser.add_argument("--batch", type=whole, default=32, help="images computed at once")
    wait = _within(0, LONGEST_WAIT)
    parser.add_argument("--wait", type=wait, default=2.0, help="milliseconds that an image waits for others")
    parser.add_argument("--max-mb", type=_within(0, LARGEST_UPLOAD, positive), default=10.0, help="largest upload")
    parser.add_argument("--device", help="such as cuda:1; by default the GPU that torch finds, or else cpu")
    return parser


def _within(least: int, most: int, takes: Callable[[str], float] = float) -> Callable[[str], float]:
    """Returns a parser of numbers within a range; `takes` makes the number from a text."""

    def checked(text: str) -> float:
        value = takes(text)
        if not least <= value <= most:  # nor is NaN
            raise ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return value

    checked.__name__ = "number"  # as argparse names it, where it is none
    return checked


def generate_parser() -> Parser:
    """Those of `generate`."""
    parser = Parser(prog="lora-plugins generate", description="Draw pictures for prompts.")
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="what is to be seen; several give a row each")
    add("--model", help="folder or name of the pipeline, merged or not; by default what the adapter was trained on")
    add("--adapter", action="append", default=[], help="folder or file of any format, or hf://...; several add up")
    add("--weight", action="append", type=float, help="what the update of each adapter is multiplied by, 1 by default")
    add("--checkpoint", help="a checkpoint of a TextToImageTask, in place of a model and adapters")
    add("--compare", action="store_true", help="the same pictures of the base model beside")
    add("--seed", type=int, default=0, help="seed of the first picture of each prompt; each next one has the next")
    add("--pictures", type=whole, default=4, help="how many pictures of each prompt")
    add("--out", type=place, default="generated", help="the folder")
    add("--steps", type=whole, default=30)
    add("--guidance", type=float, default=5.0, help="scale of classifier-free guidance; at most 1 for none")
    add("--negative-prompt", default="", help="what the guidance leads away from")
    add("--height", type=whole)
    add("--width", type=whole)
    add("--batch-size", type=whole, default=8, help="how many pictures are drawn at once")
    add("--dtype", help="type of the weights: float32 (by default), bfloat16 or float16")
    add("--device", help="such as cuda:1; by default the GPU that torch finds, or else cpu")
    return parser
