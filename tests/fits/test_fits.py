"""Random fits beside plain ones: a small share of `python -m tests.fits`, the same each time, and what it found."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch

from tests.fits.adapted import Adapted
from tests.fits.compare import far, judge
from tests.fits.draw import Fit, draw_fit, limited
from tests.integrations.lightning.conftest import LIGHTNING_WARNINGS
from tests.slow import slow_but

WARNINGS = [
    *LIGHTNING_WARNINGS,
    "ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning",  # its generator starts anew
    "ignore:Found \\d+ module\\(s\\) in eval mode at the start of training:UserWarning",  # frozen norms, and a teacher
    "ignore:The lr scheduler dict contains the key\\(s\\) .'monitor', 'strict':RuntimeWarning",  # in manual steps
    "ignore:ReduceLROnPlateau conditioned on metric val:RuntimeWarning",  # no validation in this epoch
    "ignore:The dirpath has changed:UserWarning",  # a run that goes on writes elsewhere
    "ignore:You're using the WeightAveraging callback:UserWarning",  # configure_model shards nothing here
    "ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning",  # the first batch accumulates
    "ignore:SWA is currently only supported every epoch:UserWarning",  # schedulers that step more often
    "ignore:Using ModelCheckpoint with manual optimization:UserWarning",
    "ignore:When using `Trainer\\(accumulate_grad_batches != 1\\)` and overriding:UserWarning",  # the warm-up
    "ignore:.`?.?fit\\(ckpt_path=:UserWarning",  # OnExceptionCheckpoint, and a module that is tested again
    "ignore:'.*center' have changed since the adapter was added:UserWarning",  # ours: it moves by hand
    "ignore:\\d+ tensors? of the frozen base (was|were) made trainable:UserWarning",  # ours: it thaws all of itself
    "ignore:\\d+ of \\d+ trainable tensors did not move:UserWarning",  # ours: LBFGS has no way down any more
    "ignore:merge_source='best', and no checkpoint was written:UserWarning",  # ours: it trained too few batches
]
"""What is said of settings that a user would choose otherwise."""

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

RUNS = slow_but(range(19), range(0, 19, 3))

FOUND = {
    "average moved by hand in a finder's trials": Fit(
        network="Twice", target="module", copies="average", finder=True, samples=40, epochs=2
    ),
    "center moved by hand in a finder's trials": Fit(network="Twice", copies="center", finder=True),
    "rounding in an average in a finder's trials": Fit(
        network="Tied", target="module", heads="none", init="pissa", copies="average", finder=True, samples=40, epochs=2
    ),
    "average moved by hand beside an averaging callback": Fit(
        target="module", copies="average", averaging="ema", loop="manual"
    ),
    "statistics of a part that is computed again": Fit(calls="checkpointed", variant="dora", norm="track"),
}
"""What random fits found."""

WHOLE = Fit(samples=40, b_ratio=4.0, best=True, checkpoints="steps", merge=False)


class OneRate(Adapted):
    """Forgets that B has a rate of its own."""

    def lora(self, *arguments):
        return Adapted(replace(self.fit, b_ratio=1.0)).lora(*arguments)


class TakesTheLast(Adapted):
    """Forgets to take the best weights."""

    def lora(self, *arguments):
        return Adapted(replace(self.fit, best=False)).lora(*arguments)


class NeverMoves(Adapted):
    """Reads checkpoints as they were at the start."""

    def read(self, path):
        return self.module()


@pytest.mark.parametrize("run", RUNS)
def test_random_fits(run):
    fit = draw_fit(f"fast.{run}")
    verdict = judge(fit)
    assert verdict.kind == "same", f"{fit}: {verdict.detail}"


@pytest.mark.parametrize("fit", FOUND.values(), ids=list(FOUND))
def test_found(fit):
    verdict = judge(fit)
    assert verdict.kind == "same", verdict.detail


@pytest.mark.parametrize(
    ("kind", "seen"),
    [(OneRate, "fit: weights"), (TakesTheLast, "fit: weights"), (NeverMoves, "read epoch=0-step=2.ckpt")],
)
def test_judge_finds_planted_defects(kind, seen):
    assert judge(WHOLE).kind == "same"
    verdict = judge(WHOLE, kind)
    assert verdict.kind == "differs"
    assert verdict.detail.startswith(seen)


@pytest.mark.parametrize(
    ("found", "expected", "is_far"),
    [
        ([nan, inf, 1.0], [nan, inf, 1.0], False),
        ([nan, 1.0], [nan, 2.0], True),
        ([inf, 1.0], [inf, 2.0], True),
        ([inf], [-inf], True),
        ([nan], [1.0], True),
        ([1.0], [nan], True),
        ([1.0], [1.0, 1.0], True),
    ],
    ids=["equal", "beside NaN", "beside infinity", "other sign", "NaN found", "NaN expected", "other shape"],
)
def test_judge_compares_all_values(found, expected, is_far):
    assert bool([*far({"x": torch.tensor(found)}, {"x": torch.tensor(expected)}, 1e-5)]) == is_far


def test_drawn_fits_keep_the_limits():
    fits = [draw_fit(str(seed)) for seed in range(500)]
    assert [fit for fit in fits if limited(fit) != fit] == []
