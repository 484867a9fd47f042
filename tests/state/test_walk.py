"""Random calls against the reference: a small share of `python -m tests.state`, the same calls each time."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.state.__main__ import Tally, report, walk
from tests.state.checks import DivergenceError
from tests.state.draw import TYPES, draw_blocks, draw_step
from tests.state.machine import Machine
from tests.state.script import script
from tests.state.shrink import Case

RUNS = 3


@pytest.mark.parametrize("dtype", TYPES)
def test_random_walks(dtype):
    tally = Tally()
    for run in range(RUNS):
        walk(f"fast.{run}", getattr(torch, dtype), tally)
    assert not tally.found, report(tally, shrinking=True)


class Calls(RuleBasedStateMachine):
    """The same, drawn and shrunk by hypothesis."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.steps = []

    @initialize(random=st.randoms(use_true_random=False), dtype=st.sampled_from(TYPES), seed=st.integers(0, 999))
    def build(self, random, dtype, seed):
        self.case = Case(draw_blocks(random), getattr(torch, dtype), seed, ())
        self.machine = Machine(self.case.blocks, self.case.dtype, seed, Path(self.folder.name))

    @rule(random=st.randoms(use_true_random=False))
    def call(self, random):
        step = draw_step(random, self.machine)
        self.steps.append(step)
        try:
            self.machine.do(step)
        except DivergenceError as divergence:
            case = Case(self.case.blocks, self.case.dtype, self.case.seed, tuple(self.steps))
            note(script(case, step, divergence))
            raise

    def teardown(self):
        if hasattr(self, "machine"):
            self.machine.close_all()
        self.folder.cleanup()


TestCalls = Calls.TestCase
TestCalls.settings = settings(
    max_examples=8,
    stateful_step_count=20,  # what a call draws of its arguments adds up; hypothesis discards what is longer
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
