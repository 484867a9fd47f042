"""Averages that callbacks of other packages put into a checkpoint bring no frozen base along."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.swa_utils import AveragedModel

from lora_plugins.integrations.lightning.checkpoint import KEY
from tests.integrations.lightning.toys import Classifier, load, loader, lora, trainer


class Average(Callback):
    """An average in a dictionary (luxonis-train's): of the module, or of a part of it under names of its own."""

    def __init__(self, part, decay=0.5):
        self.part, self.decay, self.values, self.loaded = part, decay, {}, None

    def state_dict(self):
        return {"average": {"values": self.values, "decay": self.decay}}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict["average"]["values"]

    def on_fit_start(self, trainer, pl_module):
        self.values = self.loaded or copy.deepcopy(pl_module.get_submodule(self.part).state_dict())

    def on_train_batch_end(self, trainer, pl_module, *_):
        for key, tensor in pl_module.get_submodule(self.part).state_dict().items():
            if tensor.is_floating_point():
                self.values[key].lerp_(tensor, 1 - self.decay)


class InOrder(Average):
    """The same, paired with the module by position."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        own = pl_module.get_submodule(self.part).state_dict().values()
        for average, tensor in zip(self.values.values(), own, strict=True):
            if tensor.is_floating_point():
                average.lerp_(tensor, 1 - self.decay)


class OfTorch(Average):
    """The same by torch (rfdetr's), whose mean of equal values differs from them by rounding."""

    def state_dict(self):
        return {"average_model_state_dict": self.average.state_dict()}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict["average_model_state_dict"]

    def on_fit_start(self, trainer, pl_module):
        self.average = AveragedModel(pl_module.get_submodule(self.part), avg_fn=self.mean)
        if self.loaded:
            self.average.load_state_dict(self.loaded)

    def mean(self, average, value, count):
        return average * self.decay + value * (1 - self.decay)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.average.update_parameters(pl_module.get_submodule(self.part))

    @property
    def values(self):
        return self.average.state_dict()

    @values.setter
    def values(self, _):
        pass


def tensors(value, key=""):
    if isinstance(value, dict):
        return [each for inner in value for each in tensors(value[inner], inner)]
    return [(key, value)] if isinstance(value, torch.Tensor) else []


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(
    ("make", "part"),
    [(Average, "net"), (InOrder, "net"), (OfTorch, "")],
    ids=["in a dictionary, of a part", "the same in order", "of torch, of the module"],
)
class TestAverages:
    def fit(self, folder, make, part, epochs, width, every, **options):
        average = make(part, decay=0.9)
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every)
        module = Classifier(width=width)
        trainer(folder, [lora(), average, saver], max_epochs=epochs).fit(module, loader(), **options)
        return average

    def test_file_has_only_what_is_trained_of_them(self, tmp_path, make, part):
        self.fit(tmp_path, make, part, 1, width=1_000, every=3)
        checkpoint = load(tmp_path / "step=3.ckpt")
        large = [key for key, tensor in tensors(checkpoint["callbacks"]) if tensor.numel() >= 1_000]
        assert len(large) == 3
        assert all("lora_" in key or key == "random" for key in large)  # the state of random numbers
        assert len(checkpoint[KEY]["of_callbacks"]) == 7

    def test_resume_is_bit_for_bit(self, tmp_path, make, part):
        whole = self.fit(tmp_path, make, part, 3, width=300, every=4)
        resumed = self.fit(tmp_path / "resumed", make, part, 3, width=300, every=4, ckpt_path=tmp_path / "step=8.ckpt")
        assert whole.values.keys() == resumed.values.keys()
        assert resumed.loaded._metadata  # of the versions of layers, as torch's state dicts have it
        assert all(torch.equal(value, resumed.values[key]) for key, value in whole.values.items())
