"""What is computed in float64, on devices that have none as well, and what is finite, in every type."""

import math

import pytest
import torch
from torch import Tensor

from lora_plugins.utils import are_finite, in_float64


class WithoutFloat64(Tensor):
    """Refuses to be made float64, as tensors of some devices do, until it is on the CPU."""

    refusal: type[Exception] = TypeError

    def double(self):
        raise self.refusal("float64 is not supported here")

    def cpu(self):
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("refusal", [TypeError, RuntimeError])
def test_a_device_without_float64(refusal, monkeypatch):
    monkeypatch.setattr(WithoutFloat64, "refusal", refusal)
    tensor = torch.tensor([1.0, 2.5]).as_subclass(WithoutFloat64)
    assert torch.equal(in_float64(tensor), torch.tensor([1.0, 2.5], dtype=torch.float64))


def test_the_cpu_has_it():
    tensor = torch.tensor([0.5], dtype=torch.bfloat16)
    assert torch.equal(in_float64(tensor), torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_what_is_finite(dtype):
    values = torch.tensor([1.0, -2.0, 0.0])
    assert are_finite(values.to(dtype))
    assert not are_finite(torch.where(values < 0, math.nan, values).to(dtype))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(0), torch.zeros(0, 2), torch.tensor([3], dtype=torch.uint16), torch.tensor(True)], ids=repr
)
def test_nothing_and_whole_numbers_are_finite(tensor):
    assert are_finite(tensor)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_is_not_finite(value):
    assert not are_finite(torch.tensor([1.0, value]))
