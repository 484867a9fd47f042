"""The state of random numbers in a checkpoint: that of the CPU, and that of a device, with `--device`."""

import torch

from lora_plugins.integrations.lightning.training.random_state import random_numbers, set_random_numbers


def test_what_is_drawn_on_a_device_goes_on(device):
    state = random_numbers()
    expected = [torch.rand(3), torch.rand(3, device=device)]
    set_random_numbers(state)
    torch.testing.assert_close([torch.rand(3), torch.rand(3, device=device)], expected, rtol=0, atol=0)


def test_the_state_of_a_device_that_is_not_there_means_nothing():
    state = random_numbers() | {"random_elsewhere": torch.zeros(16, dtype=torch.uint8)}
    expected = torch.rand(3)
    set_random_numbers(state)
    assert torch.equal(torch.rand(3), expected)
