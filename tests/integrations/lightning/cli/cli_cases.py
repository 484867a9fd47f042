"""What the tests of the commands share."""

from importlib.util import find_spec

import pytest

TOYS = "tests.integrations.lightning.toys"

needs_vision = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra vision")
"""For what is of the tasks."""


def checkpoint(tmp_path) -> str:
    return str(next((tmp_path / "checkpoints").glob("*.ckpt")))
