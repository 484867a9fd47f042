"""The command: see the docstring of the package."""

import argparse
import asyncio
import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.serving.adapters import write_adapters, write_base
from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.inference import merged_task
from lora_plugins.tasks.models import ModelConfig
from lora_plugins.tasks.serving import Described, Engine, Shelf, make_app

CONFIG = {"r": 8, "target_modules": ["qkv", "proj", "fc1", "fc2"], "modules_to_save": ["head"]}


class MergedModels:
    """What the engine is measured beside: a merged model for each adapter, each request by its own."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._tasks = {name: merged_task(shelf.folder / name) for name in shelf.names()}
        self._one = threading.Lock()

    def submit(self, described: Described, image: torch.Tensor) -> "Future[torch.Tensor]":
        """Computes the logits at once."""
        answer: Future[torch.Tensor] = Future()
        threading.Thread(target=self._compute, args=(described, image, answer)).start()
        return answer

    def _compute(self, described: Described, image: torch.Tensor, answer: "Future[torch.Tensor]") -> None:
        with self._one, torch.inference_mode():
            answer.set_result(self._tasks[described.name](image[None])[0])

    def close(self) -> None:
        """Has nothing to end."""

    def parameters(self) -> int:
        """Bytes of all models."""
        return sum(p.nbytes for task in self._tasks.values() for p in task.parameters())


@contextmanager
def served(engine: Any) -> Iterator[str]:
    """Runs a server for the duration of a block; gives its address."""
    server = uvicorn.Server(uvicorn.Config(make_app(engine), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


async def load(address: str, names: Sequence[str], body: bytes, requests: int, parallel: int) -> float:
    """Returns requests a second: `parallel` clients that each send the next when the last was answered."""
    left = iter(range(requests))

    async def ask(client: httpx.AsyncClient) -> None:
        for at in left:
            answer = await client.post(f"{address}/adapters/{names[at % len(names)]}/predict", content=body)
            assert answer.status_code == 200, answer.text

    async with httpx.AsyncClient(timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(parallel)))
        return requests / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Prints requests a second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="Requests a second.")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of timm")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = [f"adapter{at}" for at in range(options.adapters)]
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (options.size, options.size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    table = Table("what", "requests a second", "weights (MiB)")
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig("timm", options.model, 10, "none", {"img_size": options.size})
        base = write_base(ImageClassificationTask, model, Path(folder) / "base.safetensors")
        write_adapters(ImageClassificationTask, base, Path(folder) / "adapters", names, **CONFIG)
        shelf = Shelf(Path(folder) / "adapters", limit=options.adapters)
        kinds: dict[str, Callable[[], Any]] = {
            "one base, mixed in a batch": lambda: Engine(shelf, max_batch=options.parallel),
            "one base, one by one": lambda: Engine(shelf, max_batch=1, wait=0.0),
            "a merged model for each": lambda: MergedModels(shelf),
        }
        for what, make in kinds.items():
            engine = make()
            with served(engine) as address:
                asyncio.run(load(address, names, out.getvalue(), options.adapters, options.parallel))  # loads them
                rates = [
                    asyncio.run(load(address, names, out.getvalue(), options.requests, options.parallel))
                    for _ in range(3)
                ]
            size = engine.parameters() if isinstance(engine, MergedModels) else shelf.bytes()
            table.add_row(what, f"{sorted(rates)[1]:.1f}", f"{size / 2**20:.0f}")
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
