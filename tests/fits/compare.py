"""Does a run on both sides, and says in what they differ."""

import io
import logging
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.fits.adapted import Adapted
from tests.fits.draw import Fit
from tests.fits.reference import Plain
from tests.fits.runs import Record, Run

TOLERANCES = {"64-true": 1e-5, "32-true": 5e-3}
"""By what share of the largest value a result may be off: optimizers divide by small gradients, which magnifies
rounding, step after step. What goes wrong is seen from 1e-4 on."""


@dataclass(frozen=True)
class Verdict:
    """What came of a run.

    Args:
        kind: `same`, `both raise` or one of `DEFECTS`.
        detail: What differs, or the traceback.
    """

    kind: str
    detail: str = ""


DEFECTS = ("only ours raises", "only plain raises", "differs")
"""What has to be looked at: where only the plain side raises, ours has passed over something, or `LIMITS` lack it."""


def judge(fit: Fit, kind: type[Adapted] = Adapted) -> Verdict:
    """Does a run on both sides.

    Args:
        fit: The settings.
        kind: Our side.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        torch.manual_seed(fit.seed)
        ours = kind(fit)
        found = outcome(Run(fit, ours, Path(folder, "ours")))
        expected = outcome(Run(fit, Plain(fit, ours.starts.taken), Path(folder, "plain")))
    raised = isinstance(found, str), isinstance(expected, str)
    if any(raised):
        kinds = {(True, True): "both raise", (True, False): "only ours raises", (False, True): "only plain raises"}
        return Verdict(kinds[raised], "\n".join(text for text in (found, expected) if isinstance(text, str)))
    difference = next(differences(found, expected, TOLERANCES[fit.precision]), "")
    return Verdict("differs" if difference else "same", difference)


def outcome(run: Run) -> Record | str:
    """Carries out a run; returns what it took down, or the traceback."""
    run.folder.mkdir()
    try:
        return run.carry_out()
    except (Exception, KeyboardInterrupt, SystemExit):  # Ctrl-C of the user is seen as one of the run
        return traceback.format_exc()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Lightning prints to itself."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def differences(found: Record, expected: Record, tolerance: float) -> Iterator[str]:
    """Yields what differs, in the order in which it came about."""
    if list(found) != list(expected):
        yield f"ours did {list(found)}, the plain one {list(expected)}"
    for what in (what for what in found if what in expected):
        if isinstance(found[what], str):
            if found[what] != expected[what]:
                yield f"{what}: {found[what]!r}, expected {expected[what]!r}"
        else:
            yield from (f"{what}: {text}" for text in far(tensors(found[what]), tensors(expected[what]), tolerance))


def tensors(values: list[float] | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """What was taken down, as tensors by name."""
    if isinstance(values, Mapping):
        return values
    return {f"number {i}": torch.tensor(value, dtype=torch.float64) for i, value in enumerate(values)}


def far(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> Iterator[str]:
    """Yields which tensors are missing, of another shape, or off by more than the tolerance of the largest value."""
    if found.keys() != expected.keys():
        yield f"only one side has {sorted(found.keys() ^ expected.keys())}"
    for name in (name for name in found if name in expected):
        mine, other = found[name].double(), expected[name].double()
        if mine.shape != other.shape:
            yield f"{name} has the shape {tuple(mine.shape)}, expected {tuple(other.shape)}"
            continue
        # Losses that diverge do so on both sides; what is NaN or infinite on both says nothing of what is beside it.
        same = (mine == other) | (mine.isnan() & other.isnan())
        largest = other.masked_fill(~other.isfinite(), 0).abs().max()
        off = float((mine - other).abs().masked_fill(same, 0).max() / (1 + largest))
        if not off <= tolerance:
            yield f"{name} is off by {off:.2g}: {mine.flatten()[:3].tolist()}, expected {other.flatten()[:3].tolist()}"
