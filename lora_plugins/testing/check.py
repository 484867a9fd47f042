"""What a check is, how it fails, and how checks are run."""

import copy
import gc
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from lora_plugins.errors import ConfigError, near
from lora_plugins.utils import in_float64, own_randomness

Case = TypeVar("Case")
P = TypeVar("P")

CPU = torch.device("cpu")

TIGHT = 1e-10
"""What sums in another order may differ by in float64, as a share of the largest value."""

IMMORTAL = 20_000
"""More objects than Python, from 3.12 on, counts as frozen though nobody froze them: those that live for ever."""

MODES: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "": nullcontext,
    " without gradients": torch.no_grad,
    " in inference mode": torch.inference_mode,
}
"""How a layer is run, by what messages say of it."""


@contextmanager
def double_by_default() -> Iterator[None]:
    """Makes float64 torch's default type inside the block, as programs of other users do."""
    given = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(given)


class CheckError(AssertionError):
    """A plugin does not do what the framework relies on.

    Args:
        check: Name of the check.
        subject: The plugin and the options it was checked with.
        expected: What a plugin has to do.
        got: What this one did.
        usual_cause: What authors usually got wrong when it fails.
    """

    def __init__(self, check: str, subject: str, expected: str, got: str, usual_cause: str) -> None:
        self.check, self.expected, self.got, self.usual_cause = check, expected, got, usual_cause
        super().__init__(
            f"{subject} fails the check {check!r}.\n"
            f"  expected:    {expected}\n"
            f"  came:        {got}\n"
            f"  usual cause: {usual_cause}"
        )


class MismatchError(Exception):
    """Raised inside a check, with what came instead of what was expected."""


@dataclass(frozen=True)
class Check(Generic[Case]):
    """One thing that a plugin has to do.

    Args:
        name: Its name.
        run: Raises `MismatchError`, or whatever the plugin raises, if the plugin does not do it.
        expected: What a plugin has to do.
        usual_cause: What authors usually got wrong when it fails.
    """

    name: str
    run: Callable[[Case], None]
    expected: str
    usual_cause: str


def by_name(*groups: Iterable[Check[Case]]) -> dict[str, Check[Case]]:
    """Returns the checks of several groups by name, in order."""
    return {check.name: check for group in groups for check in group}


def chosen(checks: Mapping[str, Check[Case]], only: Collection[str] | None, skip: Collection[str]) -> list[Check[Case]]:
    """Returns the checks to run.

    Raises:
        ConfigError: If there is no check of a name, offering the near ones.
    """
    for name in (*(only or ()), *skip):
        if name not in checks:
            raise ConfigError(f"There is no check {name!r}. {near(name, checks)}")
    return [check for name, check in checks.items() if (only is None or name in only) and name not in skip]


def each_of(options: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Returns the options of a kit that checks a plugin with several, one after another.

    Raises:
        ConfigError: If they are those of one run.
    """
    if isinstance(options, Mapping):
        raise ConfigError(f"options lists those of one run after another: options=[{options!r}].")
    return options


def one_of(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Returns the options of a kit that checks a plugin with one mapping of them.

    Raises:
        ConfigError: If they are something else.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options maps names to values; it is not {options!r}. Check others by a call of their own.")
    return options or {}


def run(check: Check[Case], case: Case, subject: str) -> None:
    """Runs one check, without moving the random numbers of the process.

    Raises:
        CheckError: If the plugin fails it.
    """
    try:
        with own_randomness(0):
            check.run(case)
    except MismatchError as mismatch:
        raise CheckError(check.name, subject, check.expected, str(mismatch), check.usual_cause) from None
    except Exception as error:  # whatever the plugin raises
        got = f"{type(error).__name__}: {error}"
        raise CheckError(check.name, subject, check.expected, got, check.usual_cause) from error


def elsewhere(plugin: P) -> P:
    """Returns a plugin as another process has it, which has seen nothing yet; itself if it cannot be copied."""
    try:
        return copy.deepcopy(plugin)
    except Exception:  # as of one that holds a lock or a module
        return plugin


def require(condition: bool, got: str) -> None:
    """Raises a `MismatchError` that says what came, unless the condition holds."""
    if not condition:
        refuse(got)


def refuse(got: str) -> NoReturn:
    """Raises a `MismatchError` that says what came."""
    raise MismatchError(got)


def require_close(what: str, got: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    """Raises a `MismatchError` unless two tensors agree in shape, type and, up to a tolerance, values.

    Args:
        what: What they are, for the message.
        got: What came.
        expected: What should have come.
        tolerance: Largest difference, as a share of the largest expected value; 0 for the same bits.
    """
    got, expected = (tensor.detach().to_dense() for tensor in (got, expected))  # torch compares no sparse ones
    found, wanted = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (got, expected))
    require(found == wanted, f"{what} is {found} instead of {wanted}")
    if torch.equal(got, expected) or not expected.numel():
        return
    got, expected = in_float64(as_real(got)), in_float64(as_real(expected))
    # An untouched layer may give NaN, as the mean of no rows is, and infinities, as scores that are masked are.
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = float((got - expected).masked_fill(same, 0).abs().max())
    largest = float(expected.masked_fill(~expected.isfinite(), 0).abs().max())
    # Written so that NaN where a number is expected fails.
    require(
        difference <= tolerance * max(largest, 1.0),
        f"{what} differs by up to {difference:.2g}, where values are up to {largest:.2g}"
        + ("" if tolerance else " and every bit should agree"),
    )


def as_real(tensor: Tensor) -> Tensor:
    """Returns complex numbers as pairs of real ones; other tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors of a layer's output: the output itself, or those of a tuple, list, mapping or dataclass."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output):
        return tensors_of([getattr(output, field.name) for field in fields(output)])
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def real_tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors of a layer's output as real ones, which can be added up to a loss."""
    return [as_real(tensor) for tensor in tensors_of(output)]


def require_all_close(what: str, got: Any, expected: Any, tolerance: float = TIGHT) -> None:
    """Raises a `MismatchError` unless two outputs hold the same tensors."""
    found, wanted = tensors_of(got), tensors_of(expected)
    require(len(found) == len(wanted), f"{what} has {len(found)} tensors instead of {len(wanted)}")
    for first, second in zip(found, wanted, strict=True):
        require_close(what, first, second, tolerance)


class Named(dict[str, Tensor]):
    """Tensors by name; the error for an unknown name lists the known ones.

    Args:
        gives: What gives them, and that it does, as `store() gives`.
        tensors: The tensors.
    """

    def __init__(self, gives: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.gives = gives

    def __missing__(self, name: str) -> NoReturn:
        refuse(f"{self.gives} no {name!r}. {near(name, self)}")


def require_same_state(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a `MismatchError` unless two state dicts have the same keys and bits."""
    require(list(got) == list(expected), f"{what} has the keys {list(got)} instead of {list(expected)}")
    for key, value in expected.items():
        require_all_close(f"{key!r} of {what}", got[key], value, 0)


def copied(state: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Returns copies of the tensors under each key of a state dict, where a layer's extra state may have any number."""
    return {key: [tensor.detach().to_dense().clone() for tensor in tensors_of(value)] for key, value in state.items()}


def random_states() -> dict[str, Any]:
    """Returns the states of the sources of random numbers by whose they are: torch's, Python's and NumPy's."""
    numpy = sys.modules.get("numpy.random")
    numbers = numpy.get_state(legacy=False)["state"] if numpy else {}
    return {
        "the process": torch.get_rng_state().tolist(),
        "Python": random.getstate(),
        "NumPy": (numbers.get("pos"), bytes(numbers.get("key", b""))),
    }


def require_unmoved(before: Mapping[str, Any]) -> None:
    """Raises a `MismatchError` if the sources of random numbers are not in these states, some of `random_states`."""
    after = random_states()
    moved = [name for name, state in before.items() if state != after[name]]
    require(not moved, f"the random numbers of {', '.join(moved)} were moved")


def require_nothing_kept(call: Callable[[int], object]) -> None:
    """Raises a `MismatchError` if calls leave tensors in memory once their inputs and outputs are gone.

    Args:
        call: Makes a call; it is handed its number.
    """
    call(0)
    call(1)  # the first calls may fill a cache
    gc.collect()
    frozen_by_others = gc.get_freeze_count() > IMMORTAL
    gc.freeze()  # looks at new objects alone, of which there are few
    try:
        call(2)
        gc.collect()
        left = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
    finally:
        if not frozen_by_others:
            gc.unfreeze()
    require(not left, f"a call leaves {left} tensors in memory")
