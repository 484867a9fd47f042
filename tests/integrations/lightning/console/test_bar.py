"""The line of a terminal that shows what is done of something that takes a while."""

import sys

import pytest

from lora_plugins.integrations.lightning.console import followed

from .terminal import run

SCRIPT = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its children
from lora_plugins.integrations.lightning.console import followed
for step in followed(range({steps}), "Reading files", {steps}):
    time.sleep(0.01)
print("all of", {steps})
"""


def test_nothing_is_left_of_it():
    seen = run([sys.executable, "-c", SCRIPT.format(steps=30)], 80)
    assert ([*filter(None, seen.lines)], seen.code, seen.cursor) == (["all of 30"], 0, True)


def test_ctrl_c_gives_the_terminal_back():
    seen = run([sys.executable, "-c", SCRIPT.format(steps=3000)], 80, press_after="Reading files")
    assert seen.code != 0
    assert seen.cursor
    assert [*filter(None, seen.lines)][-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_file_has_none_of_it(capsys, steps):
    assert list(followed(range(steps), "Reading files", steps)) == list(range(steps))
    assert capsys.readouterr().out == ""
