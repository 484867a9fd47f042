"""Training under `torch.compile`: one graph, and no other one however many steps follow."""

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel

pytestmark = pytest.mark.usefixtures("compiler_as_new")

CONFIGS = {
    "lora": {},
    "dropout": {"dropout": 0.1},
    "low_memory": {"memory": "low"},
    "dora": {"variant": "dora"},
    "dora-dropout": {"variant": "dora", "dropout": 0.1},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "dtype", [pytest.param(None, marks=pytest.mark.slow), torch.bfloat16], ids=["float32", "bf16_autocast"]
)
def test_steps_after_the_first_compile_nothing(fields, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 5))
    LoraModel(model.train(), LoraConfig(r=2, init="none", **fields))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)  # a break would be an error
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(leaves, lr=1e-3)

    def step() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = compiled(torch.randn(2, 3, 6, 6)).float().square().mean()
        loss.backward()
        assert all(p.grad is not None for p in leaves)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step()
    assert len(graphs) == 1
    for _ in range(4):
        step()
    assert len(graphs) == 1
