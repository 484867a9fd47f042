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
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy


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

    def around(self, name: str, call: Callable[[Callable[[], Any]], Any]) -> None:
        """Calls a function with the method, which has its arguments, and returns what that does."""
        original = getattr(self._owner, name)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if (name, shim) not in self._shims:  # removed, while another one still calls it
                return original(*args, **kwargs)
            return call(partial(original, *args, **kwargs))

        shim = _Shim(self._owner, name, stand_in)
        self._shims.append((name, shim))
        self._owner.__dict__[name] = shim

    def after(self, name: str, then: Callable[[Any], None], before: Callable[[], None] | None = None) -> None:
        """Calls `then` with what the method returned, and `before` ahead of it."""

        def call(method: Callable[[], Any]) -> Any:
            if before is not None:
                before()
            result = method()
            then(result)
            return result

        self.around(name, call)

    def remove(self) -> None:
        """Restores the object's own methods, once no other shim is above these."""
        for name, shim in reversed(self._shims):
            shim.lora_removed = True
            top: Any = self._owner.__dict__.get(name)
            while getattr(top, "lora_removed", False):
                top = top.lora_below
            if top is None:
                self._owner.__dict__.pop(name, None)
            else:
                self._owner.__dict__[name] = top
        self._shims = []
