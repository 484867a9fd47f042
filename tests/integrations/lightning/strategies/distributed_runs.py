"""What one process of a distributed run does; started by the tests, once for each rank, by Lightning's launcher.

python -m tests.integrations.lightning.strategies.distributed_runs NAME FOLDER
"""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.toys import CONFIG, Classifier, loader, trainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")
warnings.filterwarnings("default", message=".*(got no gradient|will have no adapter)")  # ours


RANK = int(os.environ.get("LOCAL_RANK", "0"))

LEARNED = {
    "eva": LoraConfig(r=2, target_modules=["net.0", "net.3"], init="eva", init_options={"rho": 1.5}),
    "lora_ga": LoraConfig(r=1, target_modules=["net.0", "net.3"], init="lora_ga"),
}


class DumpTrained(Callback):
    """Writes what this rank has trained, before a merge."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name

    def on_train_end(self, trainer, pl_module):
        with whole_parameters(trainer.strategy.model):
            trained = {k: whole(p) for k, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(trained, self.folder / f"{self.name}-{trainer.global_rank}.pt")


def whole_parameters(model):
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, writeback=False)
    return nullcontext()


def whole(parameter):
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class CountCommunicated(Callback):
    """Writes how many numbers DDP sent in each step, and whether it looks for unused parameters."""

    def __init__(self, file):
        self.file, self.sent = file, []

    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, self.send)

    def send(self, _, bucket):
        self.sent[-1] += bucket.buffer().numel()
        return allreduce_hook(None, bucket)

    def on_train_batch_start(self, *_):
        self.sent.append(0)

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save({"sent": self.sent, "unused": trainer.strategy.model.find_unused_parameters}, self.file)


class NoNorm(Classifier):
    """Without batch norm, whose statistics each rank has for itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[1] = torch.nn.Identity()


def run(folder, name, strategy, epochs, **options) -> Trainer:
    more = options.pop("more", [])
    lora = LoraCallback(options.pop("config", CONFIG), print_plan=False, **{"merge_on_fit_end": False, **options})
    return trainer(folder, [lora, DumpTrained(folder, name), *more], strategy=strategy, devices=2, max_epochs=epochs)


def ddp(folder: Path) -> None:
    def strategy():
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)

    straight = run(folder, "straight", strategy(), 2)
    straight.callbacks.append(CountCommunicated(folder / "communicated.pt"))
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


class Headed(NoNorm):
    """With a head."""

    def __init__(self, **options):
        super().__init__(**options)
        self.head = torch.nn.Linear(3, 3)
        torch.nn.init.eye_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.net(x))


class Sharded(Headed):
    """As a user of FSDP2 writes it: layers in __init__, sharding in configure_model."""

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for module in (self.net[0], self.net, self):  # an adapted layer of its own, and one inside a group
                fully_shard(module, mesh=mesh)


class HeadBuiltLate(Headed):
    """Its own head is not adapted."""

    def __init__(self, **options):
        super().__init__(**options)
        self.built = [self._modules.pop("head")]

    def configure_model(self):
        self.head = self.built[0]


HEADED = LoraConfig(r=2, target_modules=["net.0", "net.3"], modules_to_save=["head"])


class FsdpOnCpu(FSDPStrategy):
    """Lightning refuses the class itself on the CPU, and torch needs to be told of the device."""

    def _setup_model(self, model):
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=cpu, sharding_strategy=self.sharding_strategy, **self.kwargs)


STRATEGIES = {
    "full": lambda: ModelParallelStrategy(2, 1, False, process_group_backend="gloo"),
    "distributed": lambda: ModelParallelStrategy(2, 1, True, process_group_backend="gloo"),
    "fsdp": lambda: FsdpOnCpu(process_group_backend="gloo", state_dict_type="sharded"),
}


def fsdp2(folder: Path) -> None:
    count_scattered(folder)
    validated(folder)
    after_ddp(folder)
    for kind in ("full", "distributed"):
        sharded(folder, kind, Sharded)


def count_scattered(folder: Path) -> None:
    """Writes how many numbers FSDP2 sends of gradients in an epoch."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # torch 2.8
    sent, send = [], getattr(dist, name)

    def counting(*args, **options):
        sent.append(options["input"].numel())
        return send(*args, **options)

    setattr(dist, name, counting)
    trainer = run(folder, "scattered", STRATEGIES["full"](), 1, config=HEADED)
    trainer.fit(Sharded(), loader())
    setattr(dist, name, send)
    if trainer.is_global_zero:
        torch.save({"sent": sum(sent), "steps": trainer.global_step}, folder / "scattered.pt")


def validated(folder: Path) -> None:
    """The head is frozen, in the outermost group, which FSDP2 leaves whole after validation."""
    run(folder, "unvalidated", STRATEGIES["full"](), 2).fit(Sharded(), loader())
    trainer = run(folder, "validated", STRATEGIES["full"](), 2)
    trainer.num_sanity_val_steps = 1
    trainer.fit(Sharded(), loader(), loader())
    trainer.save_checkpoint(folder / "validated.ckpt")


def after_ddp(folder: Path) -> None:
    """The same callback was in a run before in which each process had the module whole."""
    lora = LoraCallback(CONFIG, print_plan=False, merge_on_fit_end=False)
    for strategy in (DDPStrategy(process_group_backend="gloo"), STRATEGIES["full"]()):
        runs = trainer(folder, [lora], strategy=strategy, devices=2, max_epochs=1)
        runs.fit(Sharded(), loader())
    runs.save_checkpoint(folder / "after_ddp.ckpt")


def fsdp(folder: Path) -> None:
    run(folder, "head-built-late", STRATEGIES["fsdp"](), 1).fit(HeadBuiltLate(), loader())
    sharded(folder, "fsdp", Headed)
    half = run(folder, "half", STRATEGIES["distributed"](), 1, config=HEADED)
    half.fit(Sharded(), loader())
    half.save_checkpoint(folder / "distributed.ckpt")
    for kind, cls, written in (("fsdp", Headed, "distributed"), ("distributed", Sharded, "fsdp")):
        resumed = run(folder, f"{kind}-goes-on", STRATEGIES[kind](), 2, config=HEADED)
        resumed.fit(cls(), loader(), ckpt_path=folder / f"{written}.ckpt")


def sharded(folder: Path, kind: str, cls: type) -> None:
    torch.manual_seed(1 + RANK)  # each process draws for itself

    def trainer_of(name, epochs=1):
        adapter = str(folder / f"{kind}-{name}-adapter")
        return run(folder, f"{kind}-{name}", STRATEGIES[kind](), epochs, config=HEADED, save_adapter_to=adapter)

    trainer_of("straight", 2).fit(cls(), loader())
    half = trainer_of("half")
    half.fit(cls(), loader())
    for _ in range(2):  # the second one replaces the first
        half.save_checkpoint(folder / f"{kind}.ckpt")
    trainer_of("resumed", 2).fit(cls(), loader(), ckpt_path=folder / f"{kind}.ckpt")
    predictions = trainer_of("test").predict(cls(), loader(), ckpt_path=folder / f"{kind}.ckpt")
    torch.save(predictions, folder / f"{kind}-predictions-{half.global_rank}.pt")


def learned(folder: Path) -> None:
    """Each rank sees its own half of the data, and has a seed of its own."""
    for name, config in LEARNED.items():
        torch.manual_seed(RANK)
        dataset, module = loader().dataset, NoNorm()
        halves = DistributedSampler(dataset, num_replicas=2, rank=RANK, shuffle=False)
        data = DataLoader(dataset, batch_size=4, sampler=halves)
        lora = LoraCallback(config, print_plan=False, merge_on_fit_end=False)
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
        run = trainer(folder, [lora], strategy=strategy, devices=2, max_epochs=1)
        run.fit(module, data)
        torch.save(module.state_dict(), folder / f"{name}-{run.global_rank}.pt")
        LoraModel(module).save_adapter(folder / f"{name}-{run.global_rank}")
        torch.distributed.barrier()


WIDE = 8192
"""So many units make a merge that does not fit into a pipe between processes."""


def spawned(folder: Path) -> None:
    for merge in (True, False):
        module = NoNorm(width=WIDE, lr=1e-3)
        strategy = DDPStrategy(process_group_backend="gloo", start_method="spawn")
        saver = ModelCheckpoint(folder, filename=f"spawned-{merge}")
        runs = run(folder, f"spawned-{merge}", strategy, 1, merge_on_fit_end=merge, more=[saver])
        runs.fit(module, loader())
        torch.save(module.state_dict(), folder / f"spawned-state-{merge}.pt")
        if merge:
            path = folder / f"spawned-{merge}.ckpt"
            given = [("merged", None), ("checkpoint", path), ("merged_again", None)]
            found = {name: runs.validate(module, loader(), ckpt_path=at, verbose=False) for name, at in given}
            torch.save(found, folder / "spawned-found.pt")


class LogsItsOwn(NoNorm):
    """Logs a number of its own process, by which the first epoch is the best to the first, the last to the second."""

    def validation_step(self, batch, batch_idx):
        self.log("val/own", float(self.current_epoch * (1 - 2 * self.global_rank)))


def best(folder: Path) -> None:
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    saver = ModelCheckpoint(folder, filename="{epoch}-{val/own:.0f}", auto_insert_metric_name=False, monitor="val/own")
    module = LogsItsOwn()
    runs = run(folder, "best", strategy, 2, merge_source="best", more=[saver])
    runs.fit(module, loader(), loader())
    torch.save(module.state_dict(), folder / f"best-state-{runs.global_rank}.pt")


def refused(folder: Path) -> None:
    """Only the first process can see that there is no place for its files."""
    (folder / "file").touch()
    strategy = DDPStrategy(process_group_backend="gloo")
    runs = run(folder, "refused", strategy, 1, save_adapter_to=str(folder / "file" / "adapter"))
    try:
        runs.fit(NoNorm(), loader())
    except ConfigError as error:
        (folder / f"refused-{RANK}.txt").write_text(str(error))


def unused(folder: Path) -> None:
    module = NoNorm()
    module.spare = torch.nn.Linear(2, 2)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    run(folder, "unused", strategy, 1, config=LoraConfig(r=2)).fit(module, loader())


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    os._exit(0)  # processes of gloo sometimes abort at the interpreter's exit, after success
