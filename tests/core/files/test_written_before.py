"""Adapter folders of format 1 as earlier states of the project wrote them: kept as files, they load to the last bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_plugins import LoraConfig, LoraModel

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


def test_a_layer_type_has_the_files_of_the_one_that_it_was_part_of():
    timm_layers = pytest.importorskip("timm.layers")

    def same():
        torch.manual_seed(0)
        return nn.Sequential(timm_layers.Conv2dSame(2, 4, 3, 2)).double().eval()

    lora = LoraModel(same(), LoraConfig(r=2, init="none"))
    packed = lora.pack("default")
    packed.manifest["layers"]["0"]["plugin"] = "conv2d"
    model, x = same(), torch.linspace(-1, 1, 60, dtype=torch.float64).view(1, 2, 5, 6)
    LoraModel.load_packed(model, packed)
    assert torch.equal(model(x), lora.model(x))
