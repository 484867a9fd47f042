"""What all tests share: one thread for torch, so that parallel runs do not fight, and a seed for each test."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Starts every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
