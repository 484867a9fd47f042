"""One thread that computes: it takes the waiting requests, and runs those of one base and size as a batch."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_plugins.errors import LoraError
from lora_plugins.tasks.serving.described import Described
from lora_plugins.tasks.serving.shelf import Shelf


class ClosedError(LoraError, RuntimeError):
    """No request is taken any more, or too many are waiting."""


@dataclass(frozen=True, eq=False)
class _Request:
    described: Described
    image: Tensor
    answer: "Future[Tensor]" = field(default_factory=Future)


class Engine:
    """Answers requests in batches that mix adapters.

    Args:
        shelf: The adapters; the engine's thread alone loads them.
        max_batch: How many images are computed at once.
        wait: Seconds that the first of a batch waits for others.
        max_waiting: How many requests may wait; further ones are refused.
    """

    def __init__(self, shelf: Shelf, *, max_batch: int = 32, wait: float = 0.002, max_waiting: int = 1024) -> None:
        self.shelf, self._max_batch, self._wait = shelf, max_batch, wait
        self._requests: queue.Queue[_Request | None] = queue.Queue(max_waiting)
        self._closed = threading.Event()
        self._entry = threading.Lock()
        self.batches = 0
        self._thread = threading.Thread(target=self._work, name="lora-plugins-engine", daemon=True)
        self._thread.start()

    def submit(self, described: Described, image: Tensor) -> "Future[Tensor]":
        """Hands in an image (channels, H, W) in [0, 1], of the size that the adapter was trained with.

        Returns:
            What will hold its logits, or the error that its adapter caused.

        Raises:
            ClosedError: If the engine is closed, or too many requests wait.
        """
        request = _Request(described, image)
        with self._entry:  # so that nothing comes behind the end
            if self._closed.is_set():
                raise ClosedError("The server is shutting down.")
            try:
                self._requests.put_nowait(request)
            except queue.Full:
                raise ClosedError("Too many requests are waiting. Try again later.") from None
        return request.answer

    def close(self) -> None:
        """Answers waiting requests, refuses new ones, and ends the thread."""
        with self._entry:
            first = not self._closed.is_set()
            self._closed.set()
        if first:
            self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._requests.get()) is not None:
            requests, ended = self._gathered(first)
            try:
                for batch in self._batches(requests):
                    self._answer(batch)
            except Exception as error:  # whatever it is, the thread goes on
                for request in requests:
                    _fail(request, error)
            if ended:
                return

    def _gathered(self, first: _Request) -> tuple[list[_Request], bool]:
        """Returns the requests that wait or come soon, and whether the end was among them."""
        found, until = [first], time.monotonic() + self._wait
        while len(found) < self._max_batch:
            try:
                request = self._requests.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if request is None:
                return found, True
            found.append(request)
        return found, False

    def _batches(self, requests: Sequence[_Request]) -> Iterator[list[_Request]]:
        """Groups requests by base, size and number of adapters; answers those whose adapter cannot be loaded."""
        groups: dict[tuple[str, torch.Size], list[list[_Request]]] = {}
        for request in requests:
            batches = groups.setdefault((request.described.base, request.image.shape), [[]])
            names = {each.described.name for each in batches[-1]}
            versions = {each.described for each in batches[-1] if each.described.name == request.described.name}
            full = len(names | {request.described.name}) > self.shelf.limit
            if full or versions - {request.described}:
                batches.append([])
            batches[-1].append(request)
        for batch in (batch for batches in groups.values() for batch in batches):
            yield [request for request in batch if self._is_loaded(request, batch)]

    def _is_loaded(self, request: _Request, batch: Sequence[_Request]) -> bool:
        try:
            self.shelf.load(request.described, [each.described for each in batch])
        except Exception as error:  # whatever a damaged file leads to, the others are answered
            _fail(request, error)
            return False
        return True

    def _answer(self, batch: Sequence[_Request]) -> None:
        waiting = [request for request in batch if request.answer.set_running_or_notify_cancel()]
        if not waiting:
            return
        self.batches += 1
        try:
            images = torch.stack([request.image for request in waiting])
            logits = self.shelf.logits([request.described for request in waiting], images).cpu()
        except Exception as error:  # the thread goes on, and those who wait are told
            for request in waiting:
                _fail(request, error)
            return
        for request, each in zip(waiting, logits, strict=True):
            request.answer.set_result(each)


def _fail(request: _Request, error: Exception) -> None:
    """Passes an error to whoever waits for a request that is neither answered nor abandoned."""
    with suppress(InvalidStateError):
        request.answer.set_exception(error)
