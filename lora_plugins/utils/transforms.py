"""Whether functions are transformed, which torch has no public way of asking."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

_of_functions: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def transforms_are_active() -> bool:
    """Whether functions are transformed, as by `torch.func`, or numbers dual; compilers can trace the question."""
    return _of_functions() or getattr(forward_ad, "_current_level", -1) >= 0
