"""Weights that accelerate places: it reads each as an attribute, and makes a parameter of what it reads.

What it is given must be the layer's own, as the update would be written into the base, and count twice.
"""

import sys

import torch

_PLACING = ("accelerate.utils.modeling", "accelerate.utils.other")
"""Modules of accelerate that put parameters on devices, and look up which of them are one."""


def is_placed() -> bool:
    """Whether the attribute that the calling function gives is read to place it on a device."""
    if "accelerate" not in sys.modules or torch.compiler.is_compiling():
        return False
    return sys._getframe(2).f_globals.get("__name__") in _PLACING
