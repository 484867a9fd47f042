"""What one process of a distributed run does; started by the tests, once for each rank, by Lightning's launcher.

python -m tests.integrations.distributed_runs NAME FOLDER
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.toys import CONFIG, Classifier, loader, trainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")
warnings.filterwarnings("default", message=".*(got no gradient|will have no adapter)")  # ours


class DumpTrained(Callback):
    """Writes what this rank has trained, before a merge."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name

    def on_train_end(self, trainer, pl_module):
        trained = {k: p.detach().clone() for k, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(trained, self.folder / f"{self.name}-{trainer.global_rank}.pt")


class NoNorm(Classifier):
    """Without batch norm, whose statistics each rank has for itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[1] = torch.nn.Identity()


def run(folder, name, strategy, epochs, **options) -> Trainer:
    lora = LoraCallback(options.pop("config", CONFIG), print_plan=False, **{"merge_on_fit_end": False, **options})
    return trainer(folder, [lora, DumpTrained(folder, name)], strategy=strategy, devices=2, max_epochs=epochs)


def ddp(folder: Path) -> None:
    def strategy():
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)

    straight = run(folder, "straight", strategy(), 2)
    straight.fit(NoNorm(), loader())
    half = run(folder, "half", strategy(), 1)
    half.fit(NoNorm(), loader())
    half.save_checkpoint(folder / "half.ckpt")
    resumed = run(folder, "resumed", strategy(), 2)
    resumed.fit(NoNorm(), loader(), ckpt_path=folder / "half.ckpt")
    merged = run(folder, "merged", strategy(), 1, merge_on_fit_end=True, save_adapter_to=str(folder / "adapter"))
    module = NoNorm()
    merged.fit(module, loader())
    torch.save(module.state_dict(), folder / f"merged-state-{merged.global_rank}.pt")


def spawned(folder: Path) -> None:
    for merge in (True, False):
        module = NoNorm()
        strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
        run(folder, f"spawned-{merge}", strategy, 1, merge_on_fit_end=merge).fit(module, loader())
        torch.save(module.state_dict(), folder / f"spawned-state-{merge}.pt")


def unused(folder: Path) -> None:
    module = NoNorm()
    module.spare = torch.nn.Linear(2, 2)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    run(folder, "unused", strategy, 1, config=LoraConfig(r=2)).fit(module, loader())


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    os._exit(0)  # processes of gloo sometimes abort at the interpreter's exit, after success
