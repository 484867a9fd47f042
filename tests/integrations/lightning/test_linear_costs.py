"""What a fit does beside its steps costs as much for each layer in a large module as in a small one."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.integrations.lightning.module import add_names, find_copies, start_alike
from lora_plugins.integrations.lightning.training.moved_by_hand import MovedByHand
from tests.growth import EACH_BLOCK, Blocks, assert_linear
from tests.integrations.lightning.toys import loader, trainer


class Module(LightningModule):
    def __init__(self, size):
        super().__init__()
        self.net = Blocks(size)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y % 2)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def test_a_fit_and_one_that_goes_on(tmp_path):
    config = LoraConfig(r=2, target_modules=rf"net\.{EACH_BLOCK}", modules_to_save=["net.head"])

    def steps(size):
        folder = tmp_path / str(size)
        data = loader()

        def fit(epochs, path=None):
            written = LoraCallback(config, save_adapter_to=folder / "adapter", export_to=folder / "net.safetensors")
            stored = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
            trainer(folder, callbacks=[written, stored], max_epochs=epochs).fit(Module(size), data, ckpt_path=path)

        return {"fit": lambda: fit(1), "go on": lambda: fit(2, folder / "last.ckpt")}

    assert_linear(steps)


def teacher(module):
    module.teacher = copy.deepcopy(module.net).requires_grad_(False)


def teacher_with_another_head(module):
    module.teacher = nn.ModuleDict({"blocks": copy.deepcopy(module.net.blocks[1:]), "head": nn.Linear(4, 3)})
    module.teacher.requires_grad_(False)


def second_name(module):
    module.blocks = module.net.blocks


def shared_layers(module):
    teacher(module)
    for own, its in zip(module.teacher.blocks, module.net.blocks, strict=True):
        own[0] = its[0]


@pytest.mark.parametrize("change", [teacher, teacher_with_another_head, second_name, shared_layers])
def test_the_copies_of_a_module(change):
    def steps(size):
        module = Module(size)
        change(module)
        LoraModel(module, LoraConfig(r=2, target_modules=rf".*\.{EACH_BLOCK}"))
        copies = find_copies(module)
        return {
            "find": lambda: find_copies(module),
            "names": lambda: add_names(module, copies),
            "start": lambda: start_alike(module, copies, "default"),
            "watch": lambda: MovedByHand(module, copies),
        }

    assert_linear(steps)
