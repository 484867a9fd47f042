"""How a task is optimized: the numbers of its default optimizer, what may replace it, and a schedule with warm-up."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lora_plugins import ConfigError
from lora_plugins.field_checks import Check, check_fields, number_from, whole_from
from lora_plugins.tasks.argument_checks import check_callable, instance_of

LR, WEIGHT_DECAY = 1e-3, 0.01
"""Of the default optimizer, AdamW."""

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes an optimizer of parameters: a class of torch.optim, or `functools.partial` of one."""

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]
"""Makes a scheduler of an optimizer and the number of all its steps."""

_CHECKS: Mapping[str, Check] = {
    "optimizer": instance_of(Optimizer),
    "steps": whole_from(0),
    "warmup": number_from(-math.inf),
}
"""What the arguments of `warmup_cosine` can be."""


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float = 0.1) -> LRScheduler:
    """A linear warm-up, then half a cosine down to 0 (SGDR without restarts, arXiv 1608.03983), as a `LambdaLR`.

    Args:
        optimizer: The optimizer.
        steps: The number of all its steps.
        warmup: The share of the steps that the warm-up takes.

    Raises:
        ConfigError: If an argument is of another type, or `warmup` is not from 0 to below 1.
    """
    check_fields({"optimizer": optimizer, "steps": steps, "warmup": warmup}, _CHECKS)
    if not 0 <= warmup < 1:
        raise ConfigError(f"warmup is {warmup}; it is a share of all steps, from 0 to below 1.")
    rise = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min(1.0, (step - rise) / max(1, steps - rise))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def check_scheduler(name: str, value: object) -> None:
    """What makes a scheduler of an optimizer and the number of all its steps."""
    check_callable(name, value)
    kind = _called(value)
    if isinstance(kind, type) and issubclass(kind, LRScheduler):
        _check_class(name, kind, value)
    try:  # what a decorator wraps may take other arguments than what it makes
        inspect.signature(cast(Callable[..., object], value), follow_wrapped=False).bind(object(), 1)
    except ValueError:  # nobody knows the arguments of what is written in C
        return
    except TypeError as error:
        called = getattr(kind, "__name__", name)
        raise ConfigError(
            f"{name} is called with the optimizer and the number of all its steps, and {called} cannot be: {error}. "
            f"Give a function: lambda optimizer, steps: {called}(optimizer, ...)."
        ) from error


def _check_class(name: str, kind: type[LRScheduler], value: object) -> None:
    """Checks the second argument of a class of schedulers.

    The number of steps would be taken for a rate, a factor or, by `StepLR`, for the steps of one decay, which would
    never come. What a function does with it is its author's business.
    """
    second = next(iter([*inspect.signature(kind).parameters.values()][1:]), None)
    if second is None:
        return
    no_number = second.annotation is not second.empty and "int" not in _kinds(second.annotation)
    if no_number or second.name in {"step_size", *getattr(value, "keywords", ())}:
        raise ConfigError(
            f"{name} is {kind.__name__}, which takes {second.name!r} after the optimizer, where it is given the number "
            f"of all steps. Give a function: lambda optimizer, steps: {kind.__name__}(optimizer, {second.name}=...). "
            f"In YAML, take another class, such as CosineAnnealingLR, or the sections `optimizer:` and `{name}:` that "
            "stand beside `model:`, whose scheduler is stepped after each epoch."
        )


def _called(value: object) -> object:
    """Returns what a partial calls in the end; that of a YAML file is of a function that is given the class."""
    while isinstance(value, partial):
        value = next((each for each in value.args if isinstance(each, type)), value.func)
    return value


def _kinds(annotation: object) -> set[str]:
    """Returns the names of the types that an annotation allows."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    inner = re.sub(r"(?:typing\.)?(?:Optional|Union)\[(.*)\]", r"\1", text)
    return {each.strip() for each in re.split(r"[|,]", inner)}


def check_optimizer(optimizer: object, *, lr: float, weight_decay: float, default: tuple[float, float]) -> None:
    """Checks the argument `optimizer` of a task, whose default optimizer has `default` as rate and decay.

    Raises:
        ConfigError: If it is not callable, or if arguments of the default optimizer are given beside it.
    """
    if optimizer is None:
        return
    if not callable(optimizer):
        raise ConfigError(
            f"optimizer is {optimizer!r}. It is called with the parameters to train and makes an optimizer: "
            "torch.optim.AdamW, or functools.partial(torch.optim.SGD, lr=0.1). In YAML, give its class_path."
        )
    if (lr, weight_decay) != default:
        raise ConfigError(
            f"lr={lr} and weight_decay={weight_decay} are of the default optimizer, which `optimizer` replaces. Set "
            "them in `optimizer`: functools.partial(torch.optim.AdamW, lr=1e-3)."
        )
