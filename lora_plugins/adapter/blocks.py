"""Blocks: other adapters act inside a `with` statement, and afterwards everything is as before.

A block changes the model itself, for every thread and task that calls it. So only one of them can have blocks at a
time: with two, each would compute what the block of the other says.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial, wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import ParamSpec, TypeVar

from torch import nn

from lora_plugins.adapter.acting import apply_acting
from lora_plugins.adapter.gradients import require_gradient
from lora_plugins.adapter.owned_tensors import check_whole
from lora_plugins.adapter.state import Block, ModelState, Outside, model_state, present_state
from lora_plugins.adapter.whole import whole
from lora_plugins.errors import StateError
from lora_plugins.inplace import model_modules, own_tensor
from lora_plugins.utils import mark_restored, mark_stand_ins, outside_inference

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_OPENED: ContextVar[tuple[Block, ...]] = ContextVar("opened", default=())
"""The blocks that the present thread or task has opened; it shares them with what it starts in its own context."""

_TURNING = threading.RLock()
"""Held while a block is opened or left: what is put back at the end of one is put in place at the start of another."""

_LATER = (isgeneratorfunction, iscoroutinefunction, isasyncgenfunction)
"""Which functions run later than they are called."""


class Within(AbstractContextManager[nn.Module, None]):
    """The `with` statement of a block, or a decorator that opens one for each call of a function.

    Where leaving the block is interrupted, it is left once more. It is a class of its own, since an interruption could
    come before a context manager of `contextlib` runs the code that leaves the block.

    Args:
        model: An adapted model.
        opened: What acts inside.
        check: Called before with what the model is then; it raises where the block is not possible.
    """

    def __init__(self, model: nn.Module, opened: Block, check: Callable[[ModelState], None] | None = None) -> None:
        self._model, self._opened, self._check = model, opened, check
        self._inside: Block | None = None

    def __call__(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Returns a function that is called inside a block of its own.

        Raises:
            StateError: If calling it only makes a generator or a coroutine, which would run outside of the block.
        """
        if any(kind(function) for kind in _LATER):
            name, call = getattr(function, "__qualname__", repr(function)), self._opened.call
            raise StateError(
                f"{call}() cannot decorate {name}, which runs after its call and the block have ended. Open the "
                f"block inside of it: with lora.{call}(...)."
            )

        @wraps(function)
        def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with Within(self._model, self._opened, self._check):
                return function(*args, **kwargs)

        return inside

    def __enter__(self) -> nn.Module:
        opened = replace(self._opened)
        try:
            with _TURNING:
                return self._open(opened)
        except BaseException:  # an interruption may come when the block is open already
            _leave(self._model, opened)
            raise

    def __exit__(self, *error: object) -> None:
        try:
            _leave(self._model, self._inside)
        except BaseException:
            _leave(self._model, self._inside)
            raise

    def _open(self, opened: Block) -> nn.Module:
        model, state = self._model, present_state(self._model)
        state.check(opened.call)
        _check_opened_here(state, opened.call)
        if self._inside in state.blocks:  # an end of it would be the end of both
            raise StateError(f"This block is open already. Open another one inside: {opened.call}(...).")
        if self._check is not None:
            self._check(state)
        self._inside = opened
        _OPENED.set((*_OPENED.get(), opened))
        whole(model, partial(_enter, model, state, opened))
        return model


def without_adapters(model: nn.Module) -> Within:
    """Turns the model into its base for the duration of a block."""
    return Within(model, Block("disable_adapter"))


def _check_opened_here(state: ModelState, call: str) -> None:
    """Refuses a block inside a block of another thread or task."""
    others = [block for block in state.blocks if block not in _OPENED.get()]
    if others:
        raise StateError(
            f"{call}() is not possible: another thread or task is inside {others[-1].call}(), which changes the model "
            "for all of them. Let one at a time have a block and call the model, with a lock around both."
        )


@outside_inference
def _enter(model: nn.Module, state: ModelState, opened: Block) -> None:
    if state.outside is None:
        state.outside = _step_outside(model, state)
    else:
        state.values.follow_casts(model)
    state.blocks = (*state.blocks, opened)
    apply_acting(model_modules(model), state)


@outside_inference
def _leave(model: nn.Module, opened: Block | None) -> None:
    state = model_state(model)
    with _TURNING:
        if state is not None and opened in state.blocks:
            whole(model, partial(_leave_block, model, state, opened))
    _OPENED.set(tuple(block for block in _OPENED.get() if block is not opened))


def _leave_block(model: nn.Module, state: ModelState, opened: Block) -> None:
    state.blocks = tuple(block for block in state.blocks if block is not opened)
    if not state.blocks:
        _step_back(model, state)
    else:
        state.values.follow_casts(model)
    apply_acting(model_modules(model), state)


def _step_outside(model: nn.Module, state: ModelState) -> Outside:
    """Puts the base's values in place of those of the active adapters; a backward through the latter is an error."""
    owned = {name: own_tensor(model, name) for name in state.values.owner}
    check_whole(model, owned)
    trained = {name: tensor for name, tensor in owned.items() if tensor.requires_grad}
    state.values.activate(model, ())
    for name, tensor in trained.items():
        require_gradient(tensor, False, state.guards, name)
    return Outside(mark_stand_ins(owned.values()), trained)


def _step_back(model: nn.Module, state: ModelState) -> None:
    outside = state.outside
    assert outside is not None
    state.values.activate(model, state.active, back=True)
    mark_restored(outside.versions)
    for name, tensor in outside.trained.items():
        require_gradient(tensor, True, state.guards, name)
    state.outside = None
