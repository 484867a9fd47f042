"""Keeps what is made of a class for as long as the class is there.

Torch makes a class for each parametrized layer, which holds the layer. A cache of ours that held such a class would
keep the layer's weights in memory when the model is gone.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.nn.utils import parametrize

Make = TypeVar("Make", bound=Callable[..., Any])

_MADE = "_lora_made"
"""Attribute of the class of one layer: what was made of it, by function and arguments."""


def once_for_each_class(make: Make) -> Make:
    """Lets a function of a class, and of other arguments that can be hashed, keep what it returns.

    The class of a single layer keeps it itself, so that both go together.
    """
    for_good = functools.cache(make)

    @functools.wraps(make)
    def find(cls: Any, *arguments: Any, **named: Any) -> Any:
        if not any(each.__module__ == parametrize.__name__ for each in cls.__mro__):
            return for_good(cls, *arguments, **named)
        if _MADE not in vars(cls):
            type.__setattr__(cls, _MADE, {})  # a metaclass may refuse it
        key = make, cls, arguments, *named.items()  # copies of a class have the same dictionary
        made = vars(cls)[_MADE]
        if key not in made:
            made[key] = make(cls, *arguments, **named)
        return made[key]

    return cast(Make, find)
