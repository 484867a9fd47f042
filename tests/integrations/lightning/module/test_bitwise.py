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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [2, 5, 8, 300, 1024])
def test_swapped_values_have_another_checksum(size, dtype):
    tensor = torch.arange(size).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    for first, second in ((0, 1), (0, size - 1), (size // 2, size - 2)):
        other = tensor.clone()
        other[[first, second]] = tensor[[second, first]]
        assert (checksum(other) == checksum(tensor)) == torch.equal(other, tensor)


def test_swapped_rows_have_another_checksum():
    matrix = torch.randn(1024, 256)
    assert checksum(matrix[torch.tensor([1, 0, *range(2, 1024)])]) != checksum(matrix)


@pytest.mark.parametrize("tensor", SAME.values(), ids=SAME)
def test_a_copy_has_the_same_checksum(tensor):
    assert checksum(tensor) == checksum(tensor.clone(memory_format=torch.contiguous_format))
