"""Adapter folders of format 1, kept as files: they load to the last bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_plugins import LoraModel

FOLDERS = sorted(path for path in (Path(__file__).parent / "written_before").iterdir())


def base() -> nn.Module:
    """The model that they were trained on."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_computes_what_it_did(folder):
    model = base()
    lora = LoraModel.load_adapter(model, folder)
    assert lora.active_adapters == ("ad",)
    found = model(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))
    # float64 on another processor may sum in another order.
    torch.testing.assert_close(found, load_file(folder / "output.safetensors")["y"], rtol=1e-12, atol=1e-12)
