"""A constant on a device stays one, whatever was at work when it was first used there."""

import pytest
import torch

from lora_plugins.utils import on_device

META = torch.device("meta")
"""Here, a device that the constant is copied to."""


@pytest.fixture
def shifted():
    """Adds a constant that no device has seen."""
    constant = torch.arange(3.0)
    return lambda x: x + on_device(constant, x.device)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_traces_are_alike(shifted):
    x = torch.ones(3, device=META)
    first, second = (torch.jit.trace(shifted, x, check_trace=False) for _ in range(2))
    assert str(first.graph) == str(second.graph)


def test_nothing_of_a_transform_is_kept(shifted):
    x = torch.ones(3, device=META)
    torch.func.functionalize(shifted)(x)
    assert not torch._is_functional_tensor(shifted(x))
