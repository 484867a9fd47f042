"""`torch.compile` of an adapted model: one graph for each set of active adapters, and none again."""

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel

pytestmark = pytest.mark.usefixtures("compiler_as_new")


def test_switching_among_adapters_that_were_seen_compiles_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 4, 1))
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    lora.add_adapter("b", LoraConfig(r=2, init="none"))
    lora.add_adapter("c", LoraConfig(r=4, init="none"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 6)

    def outputs() -> list[Tensor]:
        results = []
        for name in ("a", "b", "c"):
            lora.set_adapter(name)
            results.append(compiled(x))
            torch.testing.assert_close(results[-1], model(x))
        with lora.disable_adapter():
            results.append(compiled(x))
        return results

    first = outputs()
    assert len(graphs) == 4
    torch.testing.assert_close(outputs(), first)
    assert len(graphs) == 4


def test_a_model_without_values_compiles_too():
    """On the device meta, which has no autocast."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    LoraModel(model, LoraConfig(r=2, dropout=0.1))
    compiled = torch.compile(model.to("meta").train(), backend="eager", fullgraph=True)
    assert compiled(torch.randn(2, 3, 4, 4, device="meta")).shape == (2, 3)
