"""Small LightningModules, written without any thought of LoRA, their data, and a quiet Trainer."""

from collections.abc import Callable

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback

CONFIG = LoraConfig(r=2, target_modules=["net.0", "net.3"])


class Classifier(LightningModule):
    """Two linear layers with batch norm between them; the base is the same for every instance of one seed."""

    def __init__(self, dropout: float = 0.0, base_seed: int = 0, width: int = 16, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base_seed)
            self.net = nn.Sequential(
                nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3), nn.Dropout(dropout)
            )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "val")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def _step(self, batch, stage):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class HidesItsBackbone(Classifier):
    """Leaves what is frozen in plain training out of its state dict."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "net.0." not in key}


class Renames(Classifier):
    """Writes its file with the names of another implementation."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"its.{key}": value for key, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {key.removeprefix("its."): value for key, value in checkpoint["state_dict"].items()}


class FillsItsBackboneIn(Classifier):
    """Leaves its backbone out of its files, and fills in what it has itself."""

    def on_save_checkpoint(self, checkpoint):
        for key in [key for key in checkpoint["state_dict"] if "net.0." in key]:
            del checkpoint["state_dict"][key]

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] |= {key: value for key, value in self.state_dict().items() if "net.0." in key}


BASE = set(Classifier().state_dict())


def lora(config=CONFIG, **options) -> LoraCallback:
    """A callback that leaves the adapter on the module when fit ends."""
    return LoraCallback(config, **{"merge_on_fit_end": False, **options})


class Scheduled(Classifier):
    """Is told how to make its scheduler."""

    def __init__(self, scheduler: Callable[[Optimizer], LRScheduler]) -> None:
        super().__init__()
        self.scheduler = scheduler


class SavesItself(Classifier):
    """Says what its hyperparameters are, and not of which class."""

    def save_hyperparameters(self, *_):
        super().save_hyperparameters({"of_its_own": 8})


def loader(samples: int = 32, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def trainer(folder, callbacks, **options) -> Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    if any("Checkpoint" in type(callback).__name__ for callback in callbacks):
        del defaults["enable_checkpointing"]
    return Trainer(callbacks=callbacks, **{**defaults, **options})


def values(module) -> dict[str, torch.Tensor]:
    """Copies the state dict."""
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


def differing(first, second) -> set[str]:
    """The keys under which two state dicts differ in a bit or in their presence."""
    shared = first.keys() & second.keys()
    return (first.keys() ^ second.keys()) | {key for key in shared if not torch.equal(first[key], second[key])}


def load(path):
    return torch.load(path, weights_only=True)


class Data(LightningDataModule):
    """The same batches for every split, for YAML files."""

    def train_dataloader(self):
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
