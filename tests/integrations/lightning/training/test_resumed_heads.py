"""A head with a momentum copy, both trained in full, in a run that is resumed."""

import copy
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.toys import differing, trainer


class MomentumHead(LightningModule):
    """Moves a frozen copy of its encoder and of its head ahead of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.encoder_k, self.head_k = (copy.deepcopy(p).requires_grad_(False) for p in (self.encoder, self.head))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        for own, its in ((self.encoder, self.encoder_k), (self.head, self.head_k)):
            for parameter, average in zip(own.parameters(), its.parameters(), strict=True):
                average.data = 0.9 * average.data + 0.1 * parameter.data
        return (self.head(self.encoder(batch)) - self.head_k(self.encoder_k(batch)).detach() - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def _fit(folder: Path, epochs: int, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = MomentumHead().double()
    config = LoraConfig(r=2, target_modules=["encoder", "encoder_k"], modules_to_save=["head", "head_k"])
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = trainer(folder, [LoraCallback(config, print_plan=False), saves], max_epochs=epochs)
    torch.manual_seed(1)
    data = torch.randn(8, 4, dtype=torch.float64)
    run.fit(module, DataLoader(data, batch_size=2), ckpt_path=ckpt_path)
    return module.state_dict()


def test_a_resumed_copy_of_a_head_is_not_said_to_be_frozen_since(tmp_path: Path) -> None:
    whole = _fit(tmp_path / "whole", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = _fit(tmp_path / "resumed", 2, tmp_path / "whole" / "epoch=0.ckpt")
    assert not [str(each.message) for each in caught if "frozen" in str(each.message)]
    assert not differing(resumed, whole)
    assert not torch.equal(whole["head_k.weight"], whole["head.weight"])
