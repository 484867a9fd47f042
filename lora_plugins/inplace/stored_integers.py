"""Notices that the integers of stored weights were averaged: the truncated average of equal ones can be one less.

`torch.optim.swa_utils` and others average all parameters of a copy in place. So a copy records its integers, and
they are looked at again when the mode of the copy is set, never in a forward, and only if something wrote to them. An
average of state dicts has floating numbers, which are rounded when they are loaded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NOTE = "_lora_note"
"""Attribute of a parameter of a copy: its version, type and sum; it goes where the parameter goes."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that can be averaged: with others, such as `torch.bits8`, torch cannot compute."""

_WHOLE = 0.01
"""What an average of equal integers may be off by: its rounding in float32."""


def take_note(parameters: Iterable[nn.Parameter | None]) -> None:
    """Records the integers among parameters, without waiting for their device."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter and _is_integer(parameter) and not parameter.is_inference():
            setattr(parameter, _NOTE, (parameter._version, parameter.dtype, _sum(parameter)))


def with_own_types(parameters: Iterable[nn.Parameter | None]) -> bool:
    """Gives the recorded ones the type that they had, and returns whether there are any."""
    noted = [parameter for parameter in parameters if parameter is not None and hasattr(parameter, _NOTE)]
    for parameter in noted:
        parameter.data = parameter.to(getattr(parameter, _NOTE)[1])
    return bool(noted)


def are_changed(parameters: Iterable[nn.Parameter | None]) -> bool:
    """Whether any differ from those recorded; waits for their device if they were written to."""
    return any(_is_changed(parameter) for parameter in parameters if hasattr(parameter, _NOTE))


def rounded(values: Mapping[str, Any], parameters: Mapping[str, nn.Parameter | None]) -> dict[str, Tensor]:
    """Returns floating values that integers are to be loaded from as integers, by name.

    Raises:
        ValueError: If some are no integers, rounding apart, naming the first.
    """
    found = {}
    for name, parameter in parameters.items():
        value = values.get(name)
        if parameter is None or not _is_integer(parameter) or value is None or not value.is_floating_point():
            continue
        whole = value.round()
        if not bool(((value - whole).abs() < _WHOLE).all()):
            raise ValueError(name)
        found[name] = whole.to(parameter.dtype)
    return found


def _is_changed(parameter: Any) -> bool:
    version, dtype, total = getattr(parameter, _NOTE)
    if parameter.dtype != dtype:
        return True
    if parameter._version == version or parameter.is_meta:
        return False
    if int(_sum(parameter)) != int(total):
        return True
    setattr(parameter, _NOTE, (parameter._version, dtype, total))
    return False


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype in _INTEGERS


def _sum(tensor: Tensor) -> Tensor:
    """Returns the sum of the magnitudes: whatever is cut off makes it smaller."""
    return tensor.detach().abs().sum(dtype=torch.int64)
