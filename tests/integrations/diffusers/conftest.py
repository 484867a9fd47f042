import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("diffusers") else ["*.py"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No look at the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
