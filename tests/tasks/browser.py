"""A page in a real browser: Chromium without a window, driven through the pipes of its debugging protocol."""

import base64
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

PROGRAM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed")

DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--hide-scrollbars",
)

START = """
import os, sys
read, write = (os.dup(int(number)) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
for pipe in (3, 4):
    os.set_inheritable(pipe, True)  # where it was 3 or 4 already, dup2 has done nothing
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Starts a program with two pipes as its descriptors 3 and 4, from which the protocol reads and to which it writes."""


class Page:
    """A page that is open."""

    def __init__(self, process, commands, answers, size):
        self._process, self._commands, self._answers = process, commands, answers
        self._buffer, self._number, self._session = b"", 0, None
        self.problems = []  # errors and warnings that the page wrote to its console, and exceptions
        self.requests = []  # URLs that it asked for
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self.resize(size)

    def open(self, url):
        """Loads a page, and waits until it has loaded."""
        self._send("Page.navigate", url=url)
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def resize(self, size):
        """Sets the size of the window, in CSS pixels."""
        width, height = size
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def prefer(self, scheme):
        """Lets the system prefer `light` or `dark`."""
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script):
        """The value of a JavaScript expression, promises awaited."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def move(self, x, y, pressed=False):
        """Moves the mouse, with its button pressed or not."""
        self._send(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=x,
            y=y,
            button="left" if pressed else "none",
            buttons=int(pressed),
        )

    def press(self, x, y, kind="mousePressed"):
        """Press the mouse button, or with `mouseReleased` let it go."""
        pressed = int(kind == "mousePressed")
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=pressed, clickCount=1)

    def click(self, selector):
        """Click the middle of an element."""
        x, y = self.middle(selector)
        self.press(x, y)
        self.press(x, y, "mouseReleased")

    def middle(self, selector):
        """The middle of an element, after it was scrolled into view."""
        return self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )

    def picture(self, path, whole=False):
        """Writes what is seen, or the whole page, as a PNG."""
        shot = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _clip(self, whole):
        if not whole:
            return {}
        width, height = self.run("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        return {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}

    def _send(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._answers.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, details):
        if method == "Runtime.exceptionThrown":
            self.problems.append(details["exceptionDetails"].get("exception", {}).get("description", str(details)))
        elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.problems.append(details["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
            self.problems.append(str(details["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])


@contextmanager
def browser_page(folder, size=DESKTOP):
    """An empty page in a browser that keeps its files in a folder; the browser ends with the block."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            START,
            str(command_read),
            str(answer_write),
            PROGRAM,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(command_read, answer_write),
    )
    os.close(command_read)
    os.close(answer_write)
    with open(command_write, "wb") as commands, open(answer_read, "rb") as answers:
        try:
            yield Page(process, commands, answers, size)
        finally:
            process.terminate()
            process.wait(timeout=30)
