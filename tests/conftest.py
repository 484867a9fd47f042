"""What all tests share: one thread for torch, so that parallel runs do not fight, and a seed for each test."""

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# For `benchmarks`. Last, so that an installed wheel of lora_plugins comes before the checkout.
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def seeded():
    """Starts every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
