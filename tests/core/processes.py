"""Processes of Python that tests of the core start."""

import os
import subprocess
import sys


def run_python(*arguments, paths=(), cwd=None, **environment):
    """Runs Python to its end; returns its exit code and what it printed.

    Args:
        *arguments: Those of Python.
        paths: Folders that it finds packages in, before those that this process does.
        cwd: The folder that it runs in.
        **environment: Further variables of its environment.
    """
    path = os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def run_tests(folder, site):
    """Runs the tests of a plugin's package that is installed in a folder `site`; returns what they print."""
    done = run_python("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", paths=[site], cwd=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout


_WITHOUT = """
import contextlib, io, sys
from lora_plugins.cli.main import main
for arguments in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments.split())
    found = [name for name in {names!r} if name in sys.modules]
    assert not found, (arguments, found)
"""


def assert_answered_without(names, lines, **environment):
    """Asserts that commands are answered without imports of these packages, one after another in a fresh process."""
    run = run_python("-P", "-c", _WITHOUT.format(lines=lines, names=names), **environment)
    assert run.returncode == 0, run.stderr
