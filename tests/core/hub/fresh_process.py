"""Scripts in processes of their own that have torch already, whose import takes longer than what they do."""

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "lora_plugins"])


@dataclass(frozen=True)
class Done:
    """What a script has left: its exit code and its two streams."""

    returncode: int | None
    stdout: str
    stderr: str


def run_fresh(code: str, folder: Path, environment: Mapping[str, str]) -> Done:
    """Runs a script in a folder, with further variables and warnings as errors.

    What reads a variable when it is imported sees these, as nothing but torch and the core has been imported.
    """
    process = _CONTEXT.Process(target=_run, args=(code, folder, dict(environment)))
    process.start()
    process.join(200)  # seconds
    process.kill()
    process.join()
    return Done(process.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr")))


def _run(code: str, folder: Path, environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    warnings.simplefilter("error")
    exec(code, {"__name__": "__main__"})
    sys.stdout.flush()
