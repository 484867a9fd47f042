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
    def made_once(cls: Any, *arguments: Any, **named: Any) -> Any:
        if not _is_of_one_layer(cls):
            return for_good(cls, *arguments, **named)
        if _MADE not in vars(cls):
            type.__setattr__(cls, _MADE, {})  # a metaclass may refuse it
        # A class that copies the names of this one has the same dictionary.
        key = make, cls, arguments, *named.items()
        made = vars(cls)[_MADE]
        if key not in made:
            made[key] = make(cls, *arguments, **named)
        return made[key]

    return cast(Make, made_once)


def _is_of_one_layer(cls: type) -> bool:
    """Whether torch made a class, or a base of it, for a parametrized layer."""
    made = [each for each in cls.__mro__ if each.__module__ == parametrize.__name__]
    return any(each is not parametrize.ParametrizationList for each in made)
