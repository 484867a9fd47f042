"""What checks share: what they require of tensors, state dicts, random numbers and memory, and how they run a layer."""

import gc
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_plugins.errors import near
from lora_plugins.utils import in_float64

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


def move_values(tensors: Iterable[Tensor]) -> None:
    """Moves values, as training would."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(1.25).add_(0.03)


class MismatchError(Exception):
    """Raised inside a check, with what came instead of what was expected."""


class EvidentError(MismatchError):
    """Raised inside a check where what came tells the cause, which is none of the usual ones of the check."""


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
    """Returns the tensors of a layer's output: the output itself, or those of a tuple, list, mapping or dataclass.

    Of a nested tensor, whose rows are of several lengths, these rows.
    """
    if isinstance(output, Tensor):
        return [*output.unbind()] if output.is_nested else [output]
    if is_dataclass(output):
        return tensors_of([getattr(output, field.name) for field in fields(output)])
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def real_tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors of a layer's output as real ones, which can be added up to a loss."""
    return [as_real(tensor) for tensor in tensors_of(output)]


def uneven_sum(tensor: Tensor) -> Tensor:
    """Returns a sum of values, each by a factor of its own: a loss whose gradient tells them apart."""
    factors = torch.linspace(-1, 2, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return (tensor * factors.view(tensor.shape)).sum()


def require_all_close(what: str, got: Any, expected: Any, tolerance: float = TIGHT) -> None:
    """Raises a `MismatchError` unless two outputs hold the same tensors."""
    found, wanted = tensors_of(got), tensors_of(expected)
    require(len(found) == len(wanted), f"{what} has {len(found)} tensors instead of {len(wanted)}")
    for first, second in zip(found, wanted, strict=True):
        require_close(what, first, second, tolerance)


def require_same_form(what: str, got: Any, expected: Any) -> None:
    """Raises a `MismatchError` unless two outputs are of the same types, names and texts or whole numbers."""
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        return
    kinds = [type(each).__qualname__ for each in (got, expected)]
    require(type(got) is type(expected), f"{what} has a {kinds[0]} instead of a {kinds[1]}")
    if is_dataclass(expected):
        got, expected = ({field.name: getattr(each, field.name) for field in fields(each)} for each in (got, expected))
    if isinstance(expected, Mapping):
        require(list(got) == list(expected), f"{what} has the keys {list(got)} instead of {list(expected)}")
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        require(len(got) == len(expected), f"{what} has {len(got)} items instead of {len(expected)}")
        for first, second in zip(got, expected, strict=True):
            require_same_form(what, first, second)
    elif isinstance(expected, int | str):
        require(got == expected, f"{what} has {got!r} instead of {expected!r}")


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


def require_nothing_kept(call: Callable[[int], object], besides: int = 0) -> None:
    """Raises a `MismatchError` if calls leave more tensors in memory than these, as `tensors_left` counts them."""
    left = tensors_left(call)
    require(left <= besides, f"a call leaves {left} tensors in memory" + (f" instead of {besides}" if besides else ""))


def tensors_left(call: Callable[[int], object]) -> int:
    """Returns how many tensors calls, by number, leave in memory once their inputs and outputs are gone."""
    call(0)
    call(1)  # the first calls may fill a cache
    gc.collect()
    frozen_by_others = gc.get_freeze_count() > IMMORTAL
    gc.freeze()  # looks at new objects alone, of which there are few
    try:
        call(2)
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())
    finally:
        if not frozen_by_others:
            gc.unfreeze()
