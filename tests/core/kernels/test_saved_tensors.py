"""Hooks of saved tensors, as those that offload them, may give a tensor back in another memory layout."""

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.testing.required import require_nothing_kept

LAST = torch.channels_last
INPUTS = {
    "transposed": lambda: (nn.Linear(8, 6), (8, 4), lambda x: x.T),
    "expanded": lambda: (nn.Linear(8, 6), (1, 8), lambda x: x.expand(4, 8)),
    "expanded_rows": lambda: (nn.Linear(8, 6), (2, 1, 8), lambda x: x.expand(2, 4, 8)),
    "step": lambda: (nn.Linear(8, 6), (4, 16), lambda x: x[:, ::2]),
    "windows": lambda: (nn.Linear(8, 6), (20,), lambda x: x.unfold(0, 8, 3)),
    "images": lambda: (nn.Conv2d(8, 8, 3), (2, 8, 5, 5), lambda x: x.to(memory_format=LAST)),
    "some_channels": lambda: (nn.Conv2d(8, 8, 3), (2, 12, 5, 5), lambda x: x.to(memory_format=LAST)[:, :8]),
    "pointwise": lambda: (nn.Conv2d(8, 8, 1), (2, 8, 5, 5), lambda x: x.to(memory_format=LAST)),
    "grouped": lambda: (nn.Conv2d(8, 8, 3, groups=4), (2, 5, 5, 8), lambda x: x.permute(0, 3, 2, 1)),
    "one_channel": lambda: (nn.Conv2d(1, 4, 3), (2, 1, 5, 5), lambda x: x.to(memory_format=LAST)),
}
"""A layer, the shape of a tensor, and how its input comes from that."""


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
def test_gradients_are_the_same_in_another_layout(make, variant, dropout, order):
    torch.manual_seed(0)
    layer, shape, change = make()
    source = torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(layer).double()
    LoraModel(model, LoraConfig(r=2, init="none", target_modules=["0"], dropout=dropout, variant=variant))

    def gradients(unpack) -> list[Tensor]:
        torch.manual_seed(1)
        x = source.clone().requires_grad_()
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            loss = model(change(x)).square().sum()
            for _ in range(order - 1):
                found = torch.autograd.grad(loss, leaves, create_graph=True)
                loss = sum(gradient.square().sum() for gradient in found)
            return list(torch.autograd.grad(loss, leaves))

    found = gradients(lambda tensor: tensor.contiguous())
    torch.testing.assert_close(found, gradients(lambda tensor: tensor), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("fields", [{}, {"quantize": "nf4", "quantize_options": {"min_size": 0}}], ids=["plain", "nf4"])
def test_hooks_may_be_forbidden(variant, fields):
    model = nn.Sequential(nn.Linear(8, 6))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"], variant=variant, **fields))
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"):
        model(torch.randn(4, 8)).sum().backward()


def test_a_layer_that_saves_its_output_leaves_nothing_in_memory_without_a_backward():
    layer = nn.LSTM(8, 8)
    LoraModel(nn.ModuleList([layer]), LoraConfig(r=2, quantize="nf4", quantize_options={"min_size": 0}))
    require_nothing_kept(lambda _: layer(torch.randn(4, 8, requires_grad=True)))
