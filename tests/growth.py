"""Counts the calls of what is done once, on models of growing numbers of layers."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

TORCH = str(Path(torch.__file__).parent)
SIZES = (10, 20, 40)
EACH_BLOCK = r"blocks\.\d+\.0"


class Blocks(nn.Module):
    """Small linear layers in numbered blocks, and a head."""

    def __init__(self, size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(size))
        self.head = nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.eval()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def calls(run: Callable[[], object]) -> int:
    """Returns how many functions a call calls, those in C included, without what torch itself calls.

    For each module, `load_state_dict` of torch looks through all keys of what that module is in.
    """
    count = 0

    def profile(frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call") and not frame.f_code.co_filename.startswith(TORCH)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def assert_linear(steps_of: Callable[[int], dict[str, Callable[[], object]]]) -> None:
    """Asserts of each step that the second ten layers add as many calls as the next twenty do, by halves."""
    for step in steps_of(SIZES[0]).values():
        step()  # what is imported, and compiled, once
    counts = [{name: calls(step) for name, step in steps_of(size).items()} for size in SIZES]
    for name, (small, middle, large) in {name: [each[name] for each in counts] for name in counts[0]}.items():
        assert large - middle < 1.05 * 2 * (middle - small) + 50, f"{name}: {small}, {middle}, {large}"
