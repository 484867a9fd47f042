"""An adapted model in Lightning Fabric, beside the same loop without it."""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback

CONFIG = LoraConfig(r=2, target_modules=["0"], modules_to_save=["4"], dropout=0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def trained(model, call, backward, optimizer):
    """Takes three steps, and returns what the model has learned."""
    torch.manual_seed(1)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    for _ in range(3):
        backward(nn.functional.cross_entropy(call(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def optimizer_of(model):
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)


def test_a_loop_in_fabric_trains_saves_and_goes_on_as_one_without_it(tmp_path):
    plain, model = network(), network()
    for each in (plain, model):
        torch.manual_seed(2)
        LoraModel(each, CONFIG)
    resumed = copy.deepcopy(model)
    expected = trained(plain, plain, lambda loss: loss.backward(), optimizer_of(plain))
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, optimizer_of(model))
    found = trained(model, wrapped, fabric.backward, optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    fabric.save(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    again, state = fabric.setup(resumed, optimizer_of(resumed))
    fabric.load(tmp_path / "state.ckpt", {"model": again, "optimizer": state})
    assert all(torch.equal(value, found[name]) for name, value in resumed.named_parameters())
    LoraModel(model).save_adapter(tmp_path / "adapter")
    loaded = LoraModel.load_adapter(network(), tmp_path / "adapter").model.eval()
    images = torch.ones(1, 3, 8, 8)
    assert torch.equal(loaded(images), wrapped.eval()(images))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_precision_of_fabric_is_that_of_the_adapted_model(precision):
    model = network()
    LoraModel(model, CONFIG)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    wrapped, optimizer = fabric.setup(model, optimizer_of(model))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = trained(model, wrapped, fabric.backward, optimizer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    out = wrapped.eval()(torch.ones(2, 3, 8, 8)).float()
    LoraModel(model).merge_and_unload()
    torch.testing.assert_close(wrapped(torch.ones(2, 3, 8, 8)).float(), out, rtol=2e-2, atol=2e-2)


def test_the_callback_of_the_trainer_is_refused_with_what_to_call():
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[LoraCallback(CONFIG)])
    with pytest.raises(ConfigError, match=r"given to Fabric.*call LoraModel\(model, config\) before fabric.setup"):
        fabric.setup(network())
