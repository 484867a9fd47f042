"""LightningModules that build layers after their constructor, as published packages do."""

import torch
from torch import nn

from tests.integrations.lightning.toys import Classifier


def head(width: int = 16) -> nn.Linear:
    """A pretrained layer: the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(width, 3)


class _Late(Classifier):
    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.net[3] = nn.Identity()
        self.head = None

    def forward(self, x):
        return self.head(self.net(x))

    def build(self) -> None:
        if self.head is None:
            self.head = head()


class InSetup(_Late):
    """Once, in the first setup of any stage."""

    def setup(self, stage=None):
        self.build()


class InConfigureModel(_Late):
    def configure_model(self):
        self.build()


class InEverySetup(_Late):
    """Builds the layer anew each time and keeps its values, as pyannote does, also before a checkpoint is loaded."""

    def setup(self, stage=None):
        before = self.state_dict()
        self.head = head()
        self.load_state_dict(before, strict=False)

    def on_load_checkpoint(self, checkpoint):
        self.setup()


class OnLoading(_Late):
    """In fit by setup, and of a loaded module by what the checkpoint says of it."""

    def setup(self, stage=None):
        if stage == "fit":
            self.build()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["width"] = self.head.in_features

    def on_load_checkpoint(self, checkpoint):
        self.head = head(checkpoint["width"])


class ByShape(InSetup):
    """Reads from the weights in the checkpoint how large a layer is."""

    def setup(self, stage=None):
        if stage == "fit":
            self.build()

    def on_load_checkpoint(self, checkpoint):
        self.head = head(checkpoint["state_dict"]["head.weight"].shape[1])


class FromScratch(_Late):
    """Builds the layer again before a checkpoint is loaded, with random values: it expects all of them in the file."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.build()

    def on_load_checkpoint(self, checkpoint):
        self.head = nn.Linear(16, 3)


LATE = {cls.__name__: cls for cls in (InSetup, InConfigureModel, InEverySetup, OnLoading)}
