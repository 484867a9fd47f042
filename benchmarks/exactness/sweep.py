"""Runs cases, each in a process of its own with a time limit."""

import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.exactness.checks import Result, check
from benchmarks.exactness.suites import find_case, library

_LAZY = (
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.image_processing_utils",
    "diffusers.models.autoencoders",
    "diffusers.models.controlnets",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
"""What models of transformers and diffusers import as they are made, some seconds of torchao among it."""

Job = tuple[str, str, str]
"""Suite, name of the case, name of the library."""


def sweep(jobs: Sequence[Job], processes: int, timeout: float) -> Iterator[Result]:
    """Yields the result of each job as it is done; each process uses one thread, and may take `timeout` seconds."""
    # One server imports the libraries, and each job is a fork of it: isolation without the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_LAZY, *{name for _, _, name in jobs}])
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(_isolated, context, job, timeout) for job in jobs]
        for future in as_completed(futures):
            yield future.result()


def _isolated(context: Any, job: Job, timeout: float) -> Result:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, job))
    started = time.perf_counter()
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            result: Result = receiver.recv()
            process.join(timeout=30)  # let it clean up after itself
            return result
        reason = f"not done after {timeout:g} s"
    except EOFError:
        process.join()
        reason = f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return _broken(job, reason, time.perf_counter() - started)


def _work(sender: Connection, job: Job) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    suite, name, library_name = job
    try:
        result = check(find_case(suite, name), library(library_name))
    except Exception as error:  # the case itself is wrong, and the table has to say so
        result = _broken(job, f"{type(error).__name__}: {error}", 0.0)
    sender.send(result)


def _broken(job: Job, reason: str, seconds: float) -> Result:
    suite, name, library_name = job
    return Result(suite, name, library_name, failures={"case": " ".join(reason.split())[:400]}, seconds=seconds)
