"""Functions that stand in for methods of one object, and are removed again.

No class is patched, and no method of the Trainer is replaced. These public methods of a module or a strategy are;
checked against Lightning 2.6.6:

- `module.setup`, `module.configure_model`: layers may be built there, after `Callback.setup`, and optimizers are made
  before the next callback hook. The adapters have to be attached in between.
- `module.on_load_checkpoint`: the module may build layers there as well, and what it loads of the base is put back.
- `module.configure_optimizers`: the one moment when an optimizer that was built too early can still be completed, or
  one be built by code that fails on A and B.
- `module.on_fit_start`, `module.on_train_start`: the last hooks before batches are drawn. Those of a module or of a
  callback may draw random numbers, and those of a checkpoint are set again after them.
- `module.on_train_batch_start`: the last hook ahead of a batch; what hooks thawed of the base is frozen again after it.
- `module.on_before_optimizer_step`: the last hook ahead of a step, where learning rates follow those of their groups.
- `strategy.setup`: when it begins, a checkpoint has been restored and there is no optimizer yet, so adapters whose init
  learns from data are attached there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins import LoraError

_LONGEST = 300
"""Characters of an error that a warning cites; some list all parameters."""


class _Shim:
    """Stands in for a method; a pickle or a copy of the object has the method itself in its place.

    Lightning tells by `__code__` that a method is overridden, and looks at what `functools.wraps` points to instead.
    """

    lora_removed = False

    def __init__(self, owner: object, name: str, call: Any) -> None:
        self._owner, self._name, self._call = owner, name, call
        self.lora_below = vars(owner).get(name)
        self.__code__ = call.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (self._owner, self._name)


class MethodShims:
    """Functions that stand in for methods of one object, a module or a strategy, until they are removed.

    Several may stand in for one method, and be removed in any order.
    """

    def __init__(self, owner: LightningModule | Strategy) -> None:
        self._owner = owner
        self._shims: list[tuple[str, Any]] = []

    def after(
        self,
        name: str,
        then: Callable[[Any], None],
        before: Callable[[], None] | None = None,
        again: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Calls `then` with what the method returned, `before` ahead of it, and the method `again` where it fails."""
        original = getattr(self._owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if (name, shim) not in self._shims:  # removed, while another one still calls it
                return original(*args, **kwargs)
            if before is not None:
                before()
            method = partial(original, *args, **kwargs)
            result = method() if again is None else _tried_twice(name, method, again)
            then(result)
            return result

        shim = _Shim(self._owner, name, call)
        self._shims.append((name, shim))
        self._owner.__dict__[name] = shim

    def remove(self) -> None:
        """Restores the object's own methods, once no other shim is above these."""
        removed, self._shims = self._shims, []
        for name, shim in reversed(removed):
            shim.lora_removed = True
            top: Any = self._owner.__dict__.get(name)
            while getattr(top, "lora_removed", False):
                top = top.lora_below
            if top is None:
                self._owner.__dict__.pop(name, None)
            else:
                self._owner.__dict__[name] = top


def _tried_twice(name: str, method: Callable[[], Any], again: Callable[[], AbstractContextManager[None]]) -> Any:
    """Returns what a method returns; if it raises an error, what it returns within `again`, with a warning."""
    try:
        return method()
    except LoraError:
        raise
    except Exception as error:
        results = []
        with suppress(Exception), again():
            results.append(method())
        if not results:
            raise
        said = f"{type(error).__name__}: {error}"[:_LONGEST]
        rank_zero_warn(f"{name} failed, and was called once more as if there were no A and B. The error was: {said}")
        return results[0]
