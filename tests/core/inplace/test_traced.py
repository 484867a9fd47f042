"""Adapted models that torch.fx traces: the graph computes with the adapters as they are when it is called."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lora_plugins import LoraConfig, LoraModel, StateError

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


class Renamed(nn.Linear):
    pass


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), Scaled(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.down(x), self.up.weight)


LAYERS = {"torch": nn.Linear, "own forward": Scaled, "inherited forward": Renamed}


def adapted(model, **fields):
    torch.manual_seed(0)
    return LoraModel(model.double().eval(), LoraConfig(r=2, init="none", **fields))


def results(model, parameters):
    output = model(X)
    return [output, *torch.autograd.grad(output.square().sum(), parameters)]


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_traced_model_follows_training(layer):
    model = adapted(nn.Sequential(layer(4, 5), nn.ReLU(), layer(5, 3))).model
    traced = torch.fx.symbolic_trace(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.mul_(1.5)
    for got, expected in zip(results(traced, trained), results(model, trained), strict=True):
        assert torch.equal(got, expected)


def test_a_weight_that_another_module_reads_is_not_traced(untouched):
    lora = adapted(Tied())
    with untouched(lora.model), pytest.raises(StateError, match=r"weight of 'up' .* torch.fx would trace .* merge_and"):
        torch.fx.symbolic_trace(lora.model)
    expected = lora.model(X)
    torch.testing.assert_close(torch.fx.symbolic_trace(lora.merge_and_unload())(X), expected, rtol=1e-12, atol=1e-12)


def test_a_weight_that_another_module_reads_is_traced_where_it_is_the_base_s():
    for lora in (adapted(Tied(), exclude_modules=["up"]), adapted(Tied())):
        with lora.disable_adapter() as model:
            assert torch.equal(torch.fx.symbolic_trace(model)(X), model(X))


def test_operators_are_traced_as_ever():
    model = adapted(Tied()).model
    torch.testing.assert_close(make_fx(model)(X)(X), model(X), rtol=1e-12, atol=1e-12)
