"""Divergences that are known and not repaired yet: steps that would show them are passed over.

Each entry goes when its cause is repaired; `test_known.py` holds a reproduction of each, which fails once it is.
"""

from collections.abc import Callable

from tests.state.machine import Machine
from tests.state.rules import Step


def _backward_inside(machine: Machine, step: Step) -> bool:
    """A backward inside of a context through a forward before it: what the context freezes gets no gradient.

    After the context it is right.
    """
    return step.kind == "backward" and bool(machine.pending and machine.pending.changes & {"disable", "mixed"})


KNOWN: dict[str, Callable[[Machine, Step], bool]] = {"S7": _backward_inside}
"""By number, which steps in which states show a known divergence."""


def known(machine: Machine, step: Step, ignored: frozenset[str] = frozenset()) -> str | None:
    """Returns the number of the known divergence that a step would show, if any.

    Args:
        machine: The state.
        step: What is about to be done.
        ignored: Numbers not to pass over.
    """
    return next((name for name, shows in KNOWN.items() if name not in ignored and shows(machine, step)), None)
