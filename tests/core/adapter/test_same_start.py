"""An init that makes weights larger than their type can hold is refused, before anything is touched."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, TargetError
from lora_plugins.adapter import InitData

WIDTH = 16
X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))


def model(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(dtype)


def adapt(base, *, size, **fields):
    """Adapts with an init whose first update is as large as the loss says."""
    data = InitData([X.to(base[0].weight.dtype)], step=lambda base, x: size * base(x).float().square().sum())
    config = LoraConfig(r=2, alpha=2.0, init="lora_ga", target_modules=["0"], **fields)
    return LoraModel(base, config, init_data=data)


REFUSED = {
    "bfloat16": (torch.bfloat16, 10.0, {}),
    "float16": (torch.float16, 100.0, {}),
    "float32": (torch.float32, 1e7, {}),
    "nf4": (torch.float32, 10.0, {"quantize": "nf4", "quantize_options": {"min_size": 0}}),
}


@pytest.mark.parametrize(("dtype", "size", "fields"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused(dtype, size, fields):
    base = model(dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(TargetError, match=r"'lora_ga' makes '0\.weight' up to \S+ times as large.*would not start"):
        adapt(base, size=size, **fields)
    assert type(base[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


TAKEN = {
    "bfloat16": (torch.bfloat16, 0.01, {}, 0.01),
    "float16": (torch.float16, 0.1, {}, 0.01),
    "float32": (torch.float32, 1e3, {}, 0.01),
    "nf4": (torch.float32, 0.01, {"quantize": "nf4", "quantize_options": {"min_size": 0}}, 0.2),
}


@pytest.mark.parametrize(("dtype", "size", "fields", "allowed"), TAKEN.values(), ids=TAKEN)
def test_what_is_taken_starts_as_the_model_was(dtype, size, fields, allowed):
    base = model(dtype)
    expected = base(X.to(dtype)).detach().double()
    adapt(base, size=size, **fields)
    assert float((base(X.to(dtype)).detach().double() - expected).norm() / expected.norm()) < allowed


def test_a_weight_of_zeros_has_nothing_to_lose():
    base = model(torch.bfloat16)
    nn.init.zeros_(base[0].weight)
    adapt(base, size=10.0)
    assert base(X.bfloat16()).isfinite().all()
