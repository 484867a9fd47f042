"""Serving: one base in memory and many adapters, loaded on demand from folders and mixed in a batch.

`serve_main` is the command `serve` of `lora-plugins`; `make_app` is its application, for any server that takes ASGI.
"""

from lora_plugins.tasks.serving.app import make_app
from lora_plugins.tasks.serving.described import Described, ReplacedError
from lora_plugins.tasks.serving.engine import ClosedError, Engine
from lora_plugins.tasks.serving.serve import main as serve_main
from lora_plugins.tasks.serving.shelf import Shelf, UnknownAdapterError

__all__ = [
    "ClosedError",
    "Described",
    "Engine",
    "ReplacedError",
    "Shelf",
    "UnknownAdapterError",
    "make_app",
    "serve_main",
]
