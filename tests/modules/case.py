"""What a case is, and what is done with it."""

import functools
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint

STEPS = ("fit", "resume", "validate", "load", "merge")
"""What is checked of each class: see `_STEPS`."""


@dataclass(frozen=True)
class Case:
    """One class of one package.

    Args:
        package: Name of the distribution.
        name: Name of the class, and what sets the case apart.
        build: Makes the module, with the same values each time.
        batches: Makes the batches, the same each time: a loader, which serves for training and for validation, a data
            module, or nothing (`dict`) where the class has loaders of its own.
        config: Fields of the LoraConfig.
        options: Options of the Trainer.
        expected: Steps that are known to fail, with the reason; `plain` where the class does not do it by itself.
        arguments: Makes what `load_from_checkpoint` has to be given.
        objects: Whether its hyperparameters are objects, which need `weights_only=False`.
        sums_up: Parts of the names of metrics that the class never resets, so that they are of all runs so far.
        around: What a module is built in.
        by_hand: The networks with weights of their own that the class moves by hand, and checkpoints hold.
    """

    package: str
    name: str
    build: Callable[[], LightningModule]
    batches: Callable[[], Any]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    arguments: Callable[[], dict[str, Any]] = dict
    objects: bool = False
    sums_up: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    by_hand: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """How tests name it."""
        return f"{self.package}-{self.name}"

    @property
    def imported(self) -> str:
        """What its package is imported as."""
        return {"kaiko-eva": "eva"}.get(self.package, self.package.replace("-", "_"))


class Run:
    """One case, run once: without the callback, with it and without a merge, and with a merge."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.plain, self.plain_trainer = self.fitted("plain", [])
        self.module, self.trainer = self.fitted("lora", [self.callback()])
        self.end = {key: value.clone() for key, value in self.module.state_dict().items()}

    def callback(self, **options: Any) -> LoraCallback:
        config = LoraConfig(**{"r": 2, **self.case.config})
        return LoraCallback(config, print_plan=False, **{"merge_on_fit_end": False, **options})

    def build(self) -> LightningModule:
        torch.manual_seed(0)
        with self.case.around():
            return self.case.build()

    def run(self, name: str, callbacks: list[Any], epochs: int = 2) -> Trainer:
        saves = ModelCheckpoint(self.folder / name, filename="{epoch}", save_top_k=-1)
        options = {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "limit_test_batches": 1,
            "default_root_dir": self.folder / f"{name}_files",
        }
        return Trainer(callbacks=[*callbacks, saves], **{**options, **self.case.options})

    def fitted(self, name: str, callbacks: list[Any], **given: Any) -> tuple[LightningModule, Trainer]:
        module, trainer = self.build(), self.run(name, callbacks)
        torch.manual_seed(1)
        trainer.fit(module, **self.loaders(), **self.trusting(given))
        return module, trainer

    def trusting(self, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "weights_only": False} if self.case.objects and "ckpt_path" in given else given

    def loaders(self) -> dict[str, Any]:
        torch.manual_seed(2)
        made = self.case.batches()
        if made == {}:
            return {}
        if not isinstance(made, DataLoader):
            return {"datamodule": made}
        return {"train_dataloaders": made, "val_dataloaders": made}

    def path(self, name: str, epoch: int) -> Path:
        (found,) = (self.folder / name).glob(f"*epoch={epoch}*.ckpt")
        return found

    def scores(self, trainer: Trainer, module: LightningModule, **given: Any) -> dict[str, float]:
        if not is_overridden("validation_step", module):
            return {}
        names = {"datamodule": "datamodule", "val_dataloaders": "dataloaders"}
        data = {names[key]: value for key, value in self.loaders().items() if key in names}
        torch.manual_seed(3)
        results = trainer.validate(module, **data, verbose=False, **self.trusting(given))
        found = {key: value for result in results for key, value in result.items() if not math.isnan(value)}
        return {key: value for key, value in found.items() if not any(part in key for part in self.case.sums_up)}


def _fit(run: Run) -> None:
    """Adapters moved, the base did not, and it is not in the file."""
    start, end = run.build().state_dict(), run.module.state_dict()
    moved = [key for key in end if "lora_B" in key and end[key].any()]
    assert moved, "no adapter has moved"
    saved = torch.load(run.path("lora", 1), weights_only=False)["state_dict"]
    layers = [key.rpartition(".lora_B")[0] for key in moved]
    adapted = {f"{layer}.weight" for layer in layers if not layer.startswith(run.case.by_hand)}
    changed = [key for key in adapted & start.keys() if not torch.equal(start[key], end[key])]
    assert not changed, f"the base has moved: {changed}"
    assert not adapted & saved.keys(), f"the small checkpoint has the base: {sorted(adapted & saved.keys())}"


def _resume(run: Run) -> None:
    """A run that goes on from the first epoch has adapters of the run that was not interrupted, by names and shapes."""
    module, _ = run.fitted("resumed", [run.callback()], ckpt_path=run.path("lora", 0))
    whole, resumed = run.module.state_dict(), module.state_dict()
    assert whole.keys() == resumed.keys()
    assert any("lora_B" in key and resumed[key].any() for key in resumed)


def _validate(run: Run) -> None:
    """A fresh module with the file has the metrics of the trained one."""
    expected = run.scores(run.trainer, run.module)
    fresh = run.scores(run.run("fresh", [run.callback()]), run.build(), ckpt_path=run.path("lora", 1))
    assert fresh.keys() == expected.keys()
    for key, value in expected.items():
        assert abs(fresh[key] - value) <= 1e-4 * max(1, abs(value)), f"{key} is {fresh[key]}, and was {value}"


def _load(run: Run) -> None:
    """Without a Trainer, the module comes back as it was."""
    torch.manual_seed(0)  # of the base
    path = run.path("lora", 1)
    trusts = {"weights_only": not run.case.objects}
    with run.case.around():
        loaded = load_from_checkpoint(type(run.module), path, **trusts, **run.case.arguments())
    different = [key for key, value in loaded.state_dict().items() if not torch.equal(value, run.end[key])]
    assert not different, f"{different} are others"


def _merge(run: Run) -> None:
    """Merged, it has the classes and keys of the untouched module, and works."""
    module, trainer = run.fitted("merged", [run.callback(merge_on_fit_end=True)])
    plain = run.plain
    assert [*module.state_dict()] == [*plain.state_dict()]
    assert [type(each) for each in module.modules()] == [type(each) for each in plain.modules()]
    run.scores(trainer, module)


_STEPS: dict[str, Callable[[Run], None]] = {
    "fit": _fit,
    "resume": _resume,
    "validate": _validate,
    "load": _load,
    "merge": _merge,
}


@functools.lru_cache(maxsize=1)  # its steps follow each other, and a third of all modules takes 10 GB
def _started(case_id: str) -> Run | Exception:
    from tests.modules.cases import CASES

    folder = Path(tempfile.mkdtemp())
    try:
        run = Run(CASES[case_id], folder)
    except Exception as error:  # of whichever package it is
        shutil.rmtree(folder, ignore_errors=True)
        return error
    weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
    return run


def forget() -> None:
    """Forgets the runs so far, whose modules are in memory."""
    _started.cache_clear()


def check(case: Case, step: str) -> None:
    """Runs one step of a case.

    Raises:
        Exception: What went wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages
        run = _started(case.id)
        if isinstance(run, Exception):
            raise run
        _STEPS[step](run)
