"""Serves adapters over HTTP: `lora-plugins serve ADAPTERS`."""

import sys
from argparse import Namespace

from lora_plugins.cli import TERMINATED
from lora_plugins.devices import usable_device
from lora_plugins.errors import counted
from lora_plugins.tasks.command_lines import check_adapters
from lora_plugins.tasks.serving.app import make_app
from lora_plugins.tasks.serving.engine import Engine
from lora_plugins.tasks.serving.shelf import Shelf


def main(given: Namespace) -> int:
    """Runs the command until it is interrupted; returns the exit code.

    Raises:
        ConfigError: If torch cannot use the device.
        WeightsError: If there is no adapter in the folder.
    """
    import uvicorn

    check_adapters(given.adapters)  # a shelf begins without any
    shelf = Shelf(given.adapters, limit=given.loaded, device=usable_device(given.device, "--device"))
    host = f"[{given.host}]" if ":" in given.host else given.host  # as URLs have addresses of IPv6
    print(f"{counted(len(shelf.names()), 'adapter')} in {given.adapters}: http://{host}:{given.port}/docs")
    engine = Engine(shelf, max_batch=given.batch, wait=given.wait / 1000)
    app = make_app(engine, max_bytes=int(given.max_mb * 2**20))
    try:
        uvicorn.run(app, host=given.host, port=given.port, log_level="warning")
    except SystemExit as ended:  # it has said why
        if ended.code == TERMINATED:  # SIGTERM, which uvicorn passes on once the answers of the moment are sent
            raise
        place = f"--host {given.host} --port {given.port}"
        print(f"error: nothing can be served at {place}. Name another host or port.", file=sys.stderr)
        return 1 if ended.code else 0
    return 0
