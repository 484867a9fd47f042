"""Warnings on the console: what is said, and not where in the code."""

import subprocess
import sys
import warnings

from lora_plugins.cli import plain_warnings

WARNED = """
import warnings
from lora_plugins.cli import plain_warnings
with plain_warnings():
    warnings.warn("the first")
warnings.warn("the second")
"""


def test_a_warning_is_one_line_inside_and_as_ever_after():
    run = subprocess.run([sys.executable, "-P", "-c", WARNED], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines()[:2] == ["warning: the first", "<string>:6: UserWarning: the second"]


def test_the_format_of_somebody_else_comes_back(monkeypatch):
    def format_of_theirs(*_: object) -> str:
        return "theirs"

    monkeypatch.setattr(warnings, "formatwarning", format_of_theirs)
    with plain_warnings():
        assert warnings.formatwarning("said", UserWarning, "file.py", 1) == "warning: said\n"
    assert warnings.formatwarning is format_of_theirs
