"""Weights that accelerate places: it reads each as an attribute, and makes a parameter of what it reads.

What it is given must be the layer's own, as the update would be written into the base, and count twice. Parameters that
were one it assigns again.
"""

import sys

import torch

_PLACING = ("accelerate.utils.modeling", "accelerate.utils.other")
"""Modules of accelerate that put parameters on devices, and look up which of them are one."""


def is_placed(within: int = 1) -> bool:
    """Whether the attribute that the calling function gives or sets is placed on a device, or tied anew behind that.

    Accelerate may be up to `within` calls above the calling function.
    """
    if "accelerate" not in sys.modules or torch.compiler.is_compiling():
        return False
    caller = sys._getframe(1).f_back
    for _ in range(within):
        if caller is None or caller.f_globals.get("__name__") in _PLACING:
            return caller is not None
        caller = caller.f_back
    return False
