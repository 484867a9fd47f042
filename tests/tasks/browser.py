"""Pages in a real browser: Chromium without a window, driven through the pipes of its debugging protocol."""

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


class Browser:
    """A browser that runs; its pages share nothing."""

    def __init__(self, commands, answers):
        self._commands, self._answers = commands, answers
        self._buffer, self._number = b"", 0

    @contextmanager
    def page(self, size=DESKTOP):
        """An empty page, which is closed when the block ends."""
        context = self.send("Target.createBrowserContext")
        target = self.send("Target.createTarget", url="about:blank", **context)
        session = self.send("Target.attachToTarget", **target, flatten=True)["sessionId"]
        try:
            yield Page(self, session, size)
        finally:
            self.send("Target.disposeBrowserContext", **context)

    def send(self, method, session=None, note=None, **parameters):
        """Returns the answer to a command; what comes before it is given to `note`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self.read()).get("id") != self._number:
            if note:
                note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def read(self):
        """Waits for a message."""
        while b"\0" not in self._buffer:
            part = os.read(self._answers.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


class Page:
    """A page that is open."""

    def __init__(self, browser, session, size):
        self._browser, self._session = browser, session
        self.problems = []  # errors and warnings that the page wrote to its console, and exceptions
        self.requests = []  # URLs that it asked for
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self.resize(size)

    def open(self, url):
        """Loads a page, and waits until it has loaded."""
        self._send("Page.navigate", url=url)
        while (message := self._browser.read()).get("method") != "Page.loadEventFired":
            self._note(message)

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
        return self._browser.send(method, self._session, self._note, **parameters)

    def _note(self, message):
        if message.get("sessionId") != self._session:
            return
        method, details = message.get("method"), message.get("params", {})
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
    """An empty page in a browser of its own, which keeps its files in a folder; the browser ends with the block."""
    with running_browser(folder) as browser, browser.page(size) as page:
        yield page


@contextmanager
def running_browser(folder):
    """A browser that keeps its files in a folder; it ends with the block."""
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
            yield Browser(commands, answers)
        finally:
            process.terminate()
            process.wait(timeout=30)
