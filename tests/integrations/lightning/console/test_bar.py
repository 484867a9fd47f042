"""The line of a terminal that shows what is done of something that takes a while."""

import sys

import pytest

from lora_plugins.integrations.lightning.console import followed

pytest.importorskip("pyte")

from tests.integrations.lightning.console.terminal import run

SCRIPT = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its children
from lora_plugins.integrations.lightning.console import followed
for step in followed(range({steps}), "Reading files", {steps}):
    time.sleep(0.01)
print("all of", {steps})
"""

TOLD = """
import sys
from lora_plugins.integrations.lightning.console import followed
for step in followed(range(1), "Reading files", 1):
    logging.warning("logged")
    print("written", file=sys.stderr)
"""


def test_nothing_is_left_of_it_and_errors_that_go_to_a_file_stay_there(tmp_path):
    (tmp_path / "it.py").write_text("import logging\nlogging.basicConfig()\n" + TOLD + SCRIPT.format(steps=30))
    seen = run(["sh", "-c", f'"{sys.executable}" "{tmp_path}/it.py" 2> "{tmp_path}/errors"'], 80)
    assert ([*filter(None, seen.lines)], seen.code, seen.cursor) == (["all of 30"], 0, True)
    assert (tmp_path / "errors").read_text().splitlines() == ["WARNING:root:logged", "written"]


@pytest.mark.slow
def test_ctrl_c_gives_the_terminal_back():
    seen = run([sys.executable, "-c", SCRIPT.format(steps=3000)], 80, press_after="Reading files")
    assert seen.code != 0
    assert seen.cursor
    assert [*filter(None, seen.lines)][-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_file_has_none_of_it(capsys, steps):
    assert list(followed(range(steps), "Reading files", steps)) == list(range(steps))
    assert capsys.readouterr().out == ""
