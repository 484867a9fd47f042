"""What each process of a run on two ranks does: python -m tests.tasks.diffusion.two_ranks FOLDER."""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.integrations.diffusers import Sampling
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import ClassPictures, PicturesDataModule, SamplePictures, TextToImageTask

torch.set_num_threads(1)
warnings.simplefilter("ignore")
warnings.filterwarnings("default", message=".*sync_dist")
SAMPLING = Sampling(steps=1, guidance=1.0, height=16, width=16)


class Dump(Callback):
    """Writes what this rank has trained, and on which pictures."""

    def __init__(self, folder):
        self.folder, self.names = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.names.append([name for name, other in zip(batch.names, batch.is_class, strict=True) if not other])

    def on_train_end(self, trainer, pl_module):
        tensors = LoraModel(pl_module.parts).pack("default").tensors
        torch.save(
            (self.names, tensors, trainer.num_training_batches, torch.rand(())),
            self.folder / f"rank-{trainer.global_rank}.pt",
        )


class AsksTheOthers(Callback):
    """Adds up a number of each rank after each epoch, as other callbacks may."""

    def on_train_epoch_end(self, trainer, pl_module):
        assert trainer.strategy.reduce(torch.tensor(trainer.global_rank + 1.0), reduce_op="sum") == 3


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    seed_everything(0, verbose=False)
    task = TextToImageTask(str(folder / "base"), lr=1e-2, train_text_encoder=True)
    others = ClassPictures(str(folder / "class"), ["a dog"], count=2, sampling=SAMPLING)
    data = PicturesDataModule(str(folder / "pictures"), prompt="a sks dog", resolution=16, class_pictures=others)
    callbacks = [
        LoraCallback(LoraConfig(r=2), target="parts", print_plan=False, save_adapter_to=str(folder / "adapter")),
        Dump(folder),
        SamplePictures(str(folder / "samples"), ["a sks dog"], 1, SAMPLING),
        AsksTheOthers(),
    ]
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(task, data)
