"""Makes what the front page shows: the output of the one command, and pictures of the reports of the shipped examples.

    make front

runs `lora-plugins train` and `fit --config recipe:seg`, puts the end of what the first one prints into README.md, and
the reports of both, as a browser shows them, into docs/. It needs Chromium, and takes minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.tasks.browser import browser_page

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- what it prints, by `make front` -->\n```text\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
START = "Metrics on val"
"""With which the part of the output begins that is shown."""

WIDE, NARROW = (1180, 850), (1180, 640)


def main() -> None:
    """Runs the examples in an empty folder, and writes the front page's parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        README.write_text(with_output(README.read_text(), run(folder, "train")))
        run(folder, "fit", "--config", "recipe:seg")
        picture(folder, "digits", "light", "header", DOCS / "report_labels.png", WIDE)
        picture(folder, "seg", "dark", "#examples", DOCS / "report_masks.png", NARROW)


def run(folder: Path, *arguments: str) -> str:
    """What a command of ours prints, in lines of 100 columns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-P", "-m", "lora_plugins", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def with_output(readme: str, output: str) -> str:
    """The README with the end of an output in its place."""
    _, start, shown = output.partition(START)
    if not start or not BLOCK.search(readme):
        raise SystemExit(f"The output has no {start!r}, or the README no place for it.")
    lines = [line.rstrip() for line in (start + shown).strip().splitlines()]
    return BLOCK.sub(lambda _: "\n".join(lines) + "\n", readme, count=1)


def picture(folder: Path, run_name: str, scheme: str, top: str, path: Path, size: tuple[int, int]) -> None:
    """Writes a part of a report, from an element on, as a PNG of few colors."""
    with browser_page(folder, size) as page:
        page.prefer(scheme)
        page.open((folder / "runs" / run_name / "report.html").as_uri())
        page.run(
            f"(() => {{ const e = document.querySelector({top!r});"
            " scrollTo({top: e.getBoundingClientRect().top - 16, behavior: 'instant'}); })()"
        )
        page.picture(path)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
