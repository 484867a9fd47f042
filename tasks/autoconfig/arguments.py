"""The arguments of `lora-plugins train`."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lora_plugins.cli import Parser
from lora_plugins.errors import ConfigError
from lora_plugins.integrations.lightning.cli import SHORT, nonempty, place, positive, recipe_path, whole
from lora_plugins.tasks.autoconfig.configuration import CONFIG
from lora_plugins.tasks.autoconfig.recommended import AUTO, PLAIN, RECIPES

_OF_FIT = f"That is one of fit: lora-plugins fit --config runs/NAME/{CONFIG}, which each run leaves."
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("--config", "-c"), _OF_FIT),
    **dict.fromkeys(
        ("--resume", "--ckpt_path", "--ckpt-path", "--checkpoint"),
        f"A run goes on with: lora-plugins fit --config runs/NAME/{CONFIG} --ckpt_path CHECKPOINT.",
    ),
    **dict.fromkeys(("--lora.r", "--r", "-r", "--lora-rank", "--lora_r"), "It is --rank here."),
    **dict.fromkeys(
        ("--task", "--type"), "Folders of classes are classified, images with masks (--masks DIR) are segmented."
    ),
    **dict.fromkeys(("--num-classes", "--num_classes"), "They are counted; --classes names those of masks."),
    **dict.fromkeys(("--data", "--root", "--train", "--dataset"), "Write it without a flag: lora-plugins train DATA."),
    **dict.fromkeys(("--imgsz", "--size", "--img-size", "--image_size"), "It is --image-size here."),
    **dict.fromkeys(("--batch", "--bs", "--batch_size"), "It is --batch-size here."),
    **dict.fromkeys(("--learning-rate", "--learning_rate", "--lr0"), "It is --lr here."),
    **dict.fromkeys(("--name", "--project", "--output", "--output-dir", "--output_dir", "-o"), "It is --out here."),
    **dict.fromkeys(
        ("--target-modules", "--target_modules", "--lora-alpha", "--alpha", "--optimizer", "--loss", "--augmentation"),
        "Write the configuration (--save-config FILE), change it there, and run: lora-plugins fit --config FILE.",
    ),
}
"""What to write here, by flags of `fit` and of other programs."""

DEVICES = ("auto", "cpu", "cuda", "mps")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments by name; exits where one cannot be, with what to write in its place.

    Raises:
        ConfigError: If DATA is empty.
    """
    given = _parser().parse_args(arguments)
    if given.data == "":  # which a path takes for the current folder
        raise ConfigError("DATA is empty, perhaps from a shell variable that is not set. Name a folder or a list.")
    return given


def _parser() -> Parser:
    parser = Parser(
        prog="lora-plugins train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lora-plugins train [DATA] [flags]",
        elsewhere=ELSEWHERE,
        description="Fine-tune a model with LoRA on your images. What is not said is inferred, and printed first.",
        epilog="Without DATA, handwritten digits that come along are learned, as a first try.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="a folder of images for each class; or images/ and masks/; or a .csv or .jsonl list with columns image, "
        "label or mask; or hf://datasets/OWNER/NAME",
    )
    data.add_argument("--masks", type=place, metavar="DIR", help="the folder of masks, PNG files named as the images")
    data.add_argument("--classes", type=_names, metavar="A,B,...", help="of masks: names of the classes, in order")
    data.add_argument("--ignore-index", type=_index, metavar="N", help="of masks: the value that stands for no class")
    data.add_argument("--val-share", type=_share, metavar="X", help="held out, if there is no val folder (0.2)")
    model = parser.add_argument_group("model")
    names = "timm/NAME, transformers/OWNER/NAME, smp/Unet:resnet18, ..."
    model.add_argument("--model", type=nonempty, metavar="NAME", help=names)
    weights = "its weights, .safetensors or .pth, if no hub is to be asked"
    model.add_argument("--weights", type=nonempty, metavar="FILE", help=weights)
    model.add_argument("--image-size", type=_size, metavar="N", help="N, or HEIGHTxWIDTH")
    training = parser.add_argument_group("training")
    for flag, short in SHORT.items():
        training.add_argument(flag, type=short.takes, metavar=short.metavar, help=short.meaning)
    training.add_argument(
        "--recipe",
        type=_recipe,
        choices=RECIPES,
        metavar="NAME",
        help=f"{AUTO}, settings that were tried; {PLAIN}, LoRA's own",
    )
    training.add_argument("--device", type=_device, default="auto", metavar="NAME", help=", ".join(DEVICES))
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=place, metavar="DIR", help="where they are left (runs/NAME)")
    out.add_argument("--save-config", type=place, metavar="FILE", help="write the configuration there too")
    out.add_argument("--plan", action="store_true", help="print what would be adapted, and train nothing")
    return parser


def _share(text: str) -> float:
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: a number above 0 and below 1")
    return value


def _size(text: str) -> tuple[int, int]:
    height, *rest = text.split("x", 1)
    try:
        return whole(height), whole(rest[0] if rest else height)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels. Write N, or HEIGHTxWIDTH") from error


def _index(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no value of a mask, such as 255") from error


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(names) < 2 or len({*names}) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of two or more different names, joined by commas")
    return names


def _device(text: str) -> str:
    if text not in DEVICES:  # no near match: gpu and tpu are nearest to cpu
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DEVICES)}; auto takes the GPU that is there")
    return text


def _recipe(text: str) -> str:
    """A recipe of `train`; the shipped configurations of `fit` are called so too."""
    if text not in RECIPES:
        with suppress(ConfigError):
            recipe_path(text)
            raise argparse.ArgumentTypeError(
                f"{text!r} is a configuration of fit: lora-plugins fit --config recipe:{text}. It is {AUTO} or {PLAIN} "
                "here"
            )
    return text
