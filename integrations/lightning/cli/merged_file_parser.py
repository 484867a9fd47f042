"""The arguments of `export` and `merge`, apart from what they do: help and mistakes need not wait for Lightning."""

from lora_plugins.cli import Parser
from lora_plugins.integrations.lightning.cli.short_flags import share

MAX_ERROR = "share of an update that rounding may lose in a merge (0.1); inf for all"
"""What `--max-error` is, of each command that merges."""

_DESCRIPTIONS = {
    "export": "Writes the adapted network, merged, as a plain state dict (.safetensors) of the untouched architecture.",
    "merge": "Writes a plain checkpoint of Lightning (.ckpt) with the adapter merged into the weights.",
}


def merged_file_parser(command: str) -> Parser:
    """Those of `export` and `merge`."""
    parser = Parser(prog=f"lora-plugins {command}", description=_DESCRIPTIONS[command])
    parser.add_argument("checkpoint", help="a checkpoint with an adapter")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--model", required=True, help="import path of the LightningModule's class")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the class that the checkpoint does not have, or has otherwise; the value as in YAML",
    )
    parser.add_argument(
        "--allow-globals",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="import paths of classes and functions that hyperparameters in the checkpoint may be",
    )
    parser.add_argument("--max-error", type=share, metavar="X", help=MAX_ERROR)
    return parser
