"""The conformance kit on the format: one test for each check; and factors of every type that a file may have."""

import pytest
import torch
from lora_plugins_npz import NpzFormat

from lora_plugins.formats import PortableAdapter, PortableLayer


def test_format(format_check):
    format_check(NpzFormat(), "adapter.npz")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_factors_of_any_type_keep_their_values(tmp_path, dtype):
    layer = PortableLayer(torch.randn(2, 4).to(dtype), torch.randn(3, 2).to(dtype), 4.0)
    path = NpzFormat().save(tmp_path / "adapter.npz", PortableAdapter({"fc": layer}), None, {})
    found = NpzFormat().load(path, None, {}).layers["fc"]
    assert torch.equal(found.A.double(), layer.A.double())
    assert torch.equal(found.B.double(), layer.B.double())
