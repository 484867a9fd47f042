"""Serve adapters over HTTP: `lora-plugins serve ADAPTERS`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from lora_plugins.cli import exit_on_closed_output
from lora_plugins.errors import LoraError
from lora_plugins.tasks.serving.app import make_app
from lora_plugins.tasks.serving.engine import Engine
from lora_plugins.tasks.serving.shelf import Shelf


@exit_on_closed_output
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until it is interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lora-plugins serve",
        description="Answer images by adapters, which share one base in memory and are loaded when first asked for.",
    )
    parser.add_argument("adapters", help="a folder whose subfolders are adapter folders of tasks")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--loaded", type=int, default=64, help="adapters in memory at a time")
    parser.add_argument("--batch", type=int, default=32, help="images computed at once")
    parser.add_argument("--wait", type=float, default=2.0, help="milliseconds that an image waits for others")
    parser.add_argument("--max-mb", type=float, default=10.0, help="largest upload")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to compute on")
    options = parser.parse_args(arguments)
    for name in ("loaded", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it is at least 1")
    import uvicorn

    shelf = Shelf(options.adapters, limit=options.loaded, device=options.device)
    try:
        names = shelf.names()
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} adapters in {options.adapters}: http://{options.host}:{options.port}/docs")
    engine = Engine(shelf, max_batch=options.batch, wait=options.wait / 1000)
    app = make_app(engine, max_bytes=int(options.max_mb * 2**20))
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0
