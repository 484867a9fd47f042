"""Whether tensors are the same, bit for bit."""

import pytest
import torch

from lora_plugins.integrations.lightning.module import checksum, equal

SAME = {
    "float8": torch.arange(8.0).to(torch.float8_e4m3fn),
    "no number": torch.full((2, 3), float("nan")),
    "of one element": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "complex": torch.randn(3, 2, dtype=torch.complex128),
    "bool": torch.tensor([True, False]),
    "transposed": torch.randn(3, 2).t(),
    "cut": torch.arange(9, dtype=torch.int16)[1:],
}

OTHER = {
    "value": torch.tensor([1.0, 3.0]),
    "order": torch.tensor([2.0, 1.0]),
    "type": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "shape": torch.tensor([[1.0, 2.0]]),
    "sparse": torch.tensor([1.0, 2.0]).to_sparse(),
    "meta": torch.empty(2, device="meta"),
}


@pytest.mark.parametrize("tensor", SAME.values(), ids=SAME)
def test_a_copy_is_equal(tensor):
    assert equal(tensor, tensor.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("tensor", OTHER.values(), ids=OTHER)
def test_what_differs_is_not(tensor):
    assert not equal(torch.tensor([1.0, 2.0]), tensor)
    assert not equal(tensor, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("tensor", SAME.values(), ids=SAME)
def test_a_copy_has_the_same_checksum(tensor):
    assert checksum(tensor) == checksum(tensor.clone(memory_format=torch.contiguous_format))
