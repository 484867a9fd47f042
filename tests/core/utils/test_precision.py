"""What is computed in float64, on devices that have none as well."""

import pytest
import torch
from torch import Tensor

from lora_plugins.utils import in_float64


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
