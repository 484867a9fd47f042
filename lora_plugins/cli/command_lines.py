"""The arguments of the core's commands, apart from what the commands do: help and mistakes need not wait for torch."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_plugins.cli.parser import Parser


def inspect_parser() -> Parser:
    """Returns the parser of `inspect`."""
    parser = Parser(prog="lora-plugins inspect", description="Show what is in an adapter file.")
    parser.add_argument("path", help="a folder or file of any format, or hf://owner/name")
    return parser


def convert_parser() -> Parser:
    """Returns the parser of `convert`."""
    parser = Parser(prog="lora-plugins convert", description="Write an adapter in another format.")
    parser.add_argument("source", help="a folder or file of any format, or hf://owner/name")
    parser.add_argument("target", type=Path, help="the folder or file to write")
    parser.add_argument(
        "--to", required=True, help="the format to write: lora_plugins, peft, diffusers, kohya, comfyui, ..."
    )
    parser.add_argument("--from", dest="source_format", help="the format to read, where the file does not tell")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar=("MODULE:NAME", "ARGUMENT"),
        help="what makes the base model, where names or weights are needed: torchvision.models:resnet18, or "
        "timm:create_model resnet18",
    )
    parser.add_argument("--weights", type=Path, help="a .safetensors file with the state dict of the base model")
    for option, what in (("--read-option", "reading"), ("--write-option", "writing")):
        parser.add_argument(option, action="append", default=[], metavar="NAME=VALUE", help=f"an option of {what}")
    return parser


def plugins_parser() -> Parser:
    """Returns the parser of `plugins`."""
    return Parser(prog="lora-plugins plugins", description="List all plugins.")


def doctor_parser() -> Parser:
    """Returns the parser of `doctor`."""
    return Parser(
        prog="lora-plugins doctor",
        description="Check the installation, the optional packages, the plugins and the command `lightning`.",
    )


def new_plugin_parser() -> Parser:
    """Returns the parser of `new-plugin`."""
    parser = Parser(
        prog="lora-plugins new-plugin",
        description="Write a package with a layer type and an init to start from, and tests that use the kit.",
    )
    parser.add_argument("name", help="what the plugin is called, as in my-layer; the package is lora-plugins-NAME")
    parser.add_argument("--into", type=Path, default=Path(), help="the folder to write it into; by default this one")
    return parser


PARSERS: Mapping[str, Callable[[], Parser]] = {
    "inspect": inspect_parser,
    "convert": convert_parser,
    "plugins": plugins_parser,
    "doctor": doctor_parser,
    "new-plugin": new_plugin_parser,
}
