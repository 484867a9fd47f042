"""Stops a call at one of its lines, and says what a model is, so that before and after can be told apart."""

import dis
import gc
import linecache
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lora_plugins.integrations
import lora_plugins.tasks
from lora_plugins import LoraModel, StateError
from lora_plugins.adapter import blocks

PACKAGES = (*lora_plugins.__path__, *lora_plugins.integrations.__path__, *lora_plugins.tasks.__path__)
ERRORS = (KeyboardInterrupt, MemoryError, RuntimeError)
"""What stops a call, taken in turn."""

Picture = dict[str, Any]


@contextmanager
def traced(line: Callable[[FrameType], None]) -> Iterator[None]:
    """Calls a function before each line of our packages that is run, branches of layers and plugins included."""
    ours: dict[CodeType, bool] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code not in ours:
            ours[code] = code.co_filename.startswith(PACKAGES)
        if not ours[code]:
            return None
        if event == "line" and not _does_nothing(frame):
            line(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def passed(call: Callable[[], object]) -> list[str]:
    """Carries out a call; returns the lines that it passed, as `file:number`."""
    lines: list[str] = []
    with traced(lambda frame: lines.append(_place(frame))):
        call()
    return lines


def every_line(lines: list[str]) -> list[int]:
    """Returns where each line was passed for the first time, for the last time, and once between."""
    places: dict[str, list[int]] = {}
    for at, line in enumerate(lines):
        places.setdefault(line, []).append(at)
    return sorted({times[i] for times in places.values() for i in (0, len(times) // 2, -1)})


def stopped(call: Callable[[], object], at: int) -> tuple[str, bool]:
    """Carries out a call that is stopped before one of its lines.

    Returns:
        Where that was, and whether the call raised. It need not where it asks a plugin about a layer that is no target,
        whose errors concern nobody.
    """
    error = ERRORS[at % len(ERRORS)]("stopped by the test")
    count, where = 0, ""

    def line(frame: FrameType) -> None:
        nonlocal count, where
        count += 1
        if count == at + 1:
            where = _place(frame)
            raise error

    try:
        with traced(line):
            call()
    except BaseException as raised:  # missing memory is told as a file that cannot be read
        if error not in _chain(raised):
            raise
        return where, True
    finally:
        _release(blocks._TURNING)
    return where, False


def _release(lock: Any) -> None:
    """Releases a lock that no signal would have left: none comes between the last line inside a `with` and its end."""
    while lock._is_owned():
        lock.release()


def _does_nothing(frame: FrameType) -> bool:
    """Whether a line is a `try:`, or the end of a `with` that is traced as its line: there no signal stops a call."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return line == "try:" or (line.startswith("with ") and _ends(frame))


def _ends(frame: FrameType) -> bool:
    """Whether a `with` ends, which begins with loading the three arguments None of `__exit__`."""
    code, at = frame.f_code, frame.f_lasti
    return code.co_code[at] == dis.opmap["LOAD_CONST"] and code.co_consts[code.co_code[at + 1]] is None


def _place(frame: FrameType) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def picture(model: nn.Module, inputs: tuple[Tensor, ...]) -> Picture:
    """Returns all that a model is and computes, ready to be compared."""
    names = dict(model.named_modules(remove_duplicate=False))
    try:
        lora: LoraModel | None = LoraModel(model)
    except StateError:
        lora = None
    with torch.no_grad():
        outputs = model(*inputs)
    return {
        "outputs": {name: _bits(value) for name, value in outputs.items()},
        "tensors": {name: _bits(value) for name, value in model.state_dict().items()},
        "requires_grad": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "classes": {name: type(module).__name__ for name, module in names.items()},
        "training": {name: module.training for name, module in names.items()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in names.items()},
        "attributes": {name: sorted(vars(module)) for name, module in names.items()},
        "adapters": lora and sorted(lora.adapters),
        "active": lora and lora.active_adapters,
        "merged": lora and lora.merged_adapters,
        "values": {} if lora is None else _values(lora),
        "process": process(),
    }


def _values(lora: LoraModel) -> dict[tuple[str, str], Any]:
    """Returns what each adapter has of heads, biases and statistics, in place or not."""
    values = lora._state.values
    return {
        (name, key): _bits(values.value(lora.model, name, key)) for name in lora.adapters for key in values.of(name)
    }


def process() -> dict[str, Any]:
    """Returns what belongs to no model, and is to be what it was."""
    return {
        "random numbers": (_bits(torch.get_rng_state()), torch.initial_seed(), random.getstate()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "collection": gc.isenabled(),
        "default type": torch.get_default_dtype(),
    }


def differences(found: Picture, expected: Picture) -> list[str]:
    """Returns what is different in two pictures."""
    return [
        f"{part}: {key}"
        for part, value in expected.items()
        if found[part] != value
        for key in (_differing(found[part], value) if isinstance(value, dict) else [f"{found[part]}, not {value}"])
    ]


def _differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))


def _bits(value: Tensor) -> bytes:
    return value.detach().contiguous().numpy().tobytes()
