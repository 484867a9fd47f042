"""Serves adapters over HTTP: `lora-plugins serve ADAPTERS`."""

import sys
from collections.abc import Sequence

from lora_plugins.cli import exit_on_closed_output
from lora_plugins.devices import usable_device
from lora_plugins.errors import LoraError
from lora_plugins.tasks.command_lines import serve_parser
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.serving.app import make_app
from lora_plugins.tasks.serving.engine import Engine
from lora_plugins.tasks.serving.shelf import Shelf


@exit_on_closed_output
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command until it is interrupted; returns the exit code."""
    options = serve_parser().parse_args(arguments)
    import uvicorn

    try:
        shelf = Shelf(options.adapters, limit=options.loaded, device=usable_device(options.device, "--device"))
        names = shelf.names()
        if not names:
            raise WeightsError(
                f"There is no adapter in {options.adapters}. Give a folder whose subfolders are adapter "
                "folders, such as train leaves in runs/NAME."
            )
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} adapters in {options.adapters}: http://{options.host}:{options.port}/docs")
    engine = Engine(shelf, max_batch=options.batch, wait=options.wait / 1000)
    app = make_app(engine, max_bytes=int(options.max_mb * 2**20))
    try:
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    except SystemExit as ended:  # it has said why
        place = f"--host {options.host} --port {options.port}"
        print(f"error: nothing can be served at {place}. Name another host or port.", file=sys.stderr)
        return 1 if ended.code else 0
    return 0
