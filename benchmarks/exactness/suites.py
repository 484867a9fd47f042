"""The suites by name."""

from collections.abc import Callable, Mapping

from benchmarks.exactness.cases import Case
from benchmarks.exactness.checks import Library
from benchmarks.exactness.diffusers_cases import diffusers_cases
from benchmarks.exactness.ours import Ours, OursOnNF4
from benchmarks.exactness.timm_cases import timm_cases
from benchmarks.exactness.torchvision_cases import torchvision_cases
from benchmarks.exactness.transformers_cases import transformers_cases

SUITES: Mapping[str, Callable[[], list[Case]]] = {
    "timm": timm_cases,
    "torchvision": torchvision_cases,
    "transformers": transformers_cases,
    "diffusers": diffusers_cases,
}


def find_case(suite: str, name: str) -> Case:
    """Returns a case by suite and name; a name may be cut to the part before its colon.

    Raises:
        KeyError: If there is none.
    """
    for case in SUITES[suite]():
        if name in (case.name, case.name.partition(":")[0]):
            return case
    raise KeyError(f"The suite {suite!r} has no case {name!r}.")


def library(name: str) -> Library:
    """Returns a library by name; PEFT is imported only when it is asked for."""
    if name in (Ours.name, OursOnNF4.name):
        return Ours() if name == Ours.name else OursOnNF4()
    from benchmarks.exactness.peft_peer import Peft

    return Peft()
