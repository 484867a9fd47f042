import pytest

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No progress bars, and no look at the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
