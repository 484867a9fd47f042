"""The full order of hooks and of what stands in for them, and what is left when a run is over."""

import copy
import pickle

import pytest
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_plugins import LoraModel
from lora_plugins.adapter import model_state
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, loader, trainer, values


class Recorder(Callback):
    """Notes each hook of a callback, and whether the module is adapted by then."""

    def __init__(self, events):
        self.events = events

    def __getattribute__(self, name):
        attribute = super().__getattribute__(name)
        if name not in HOOKS:
            return attribute
        return noting(self.events, f"callback.{name}", attribute)


HOOKS = {name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")}


def noting(events, name, method):
    def note(*arguments, **named):
        module = next((a for a in arguments if isinstance(a, LightningModule)), None)
        adapted = "" if module is None else " adapted" if model_state(module) else " plain"
        events.append(name + adapted)
        return method(*arguments, **named)

    return note


class Recorded(Classifier):
    def __init__(self, events):
        super().__init__()
        vars(self)["events"] = events

    def setup(self, stage):
        self._note("setup")

    def configure_model(self):
        self._note("configure_model")

    def configure_optimizers(self):
        self._note("configure_optimizers")
        return super().configure_optimizers()

    def on_fit_start(self):
        self._note("on_fit_start")

    def on_save_checkpoint(self, checkpoint):
        self._note("on_save_checkpoint")

    def on_load_checkpoint(self, checkpoint):
        self._note("on_load_checkpoint")

    def on_fit_end(self):
        self._note("on_fit_end")

    def _note(self, name):
        self.events.append(f"module.{name} {'adapted' if model_state(self) else 'plain'}")


FIT = [
    "callback.setup plain",
    "module.setup plain",
    "module.configure_model plain",
    "module.configure_optimizers adapted",
    "callback.on_fit_start adapted",
    "module.on_fit_start adapted",
    "callback.on_train_start adapted",
    "callback.on_train_epoch_start adapted",
    "callback.on_train_batch_start adapted",
    "callback.on_before_backward adapted",
    "callback.on_after_backward adapted",
    "callback.on_before_optimizer_step adapted",
    "callback.on_before_zero_grad adapted",
    "callback.on_train_batch_end adapted",
    "callback.on_train_epoch_end adapted",
    "callback.on_save_checkpoint adapted",
    "module.on_save_checkpoint adapted",
    "callback.on_train_end adapted",
    "callback.on_fit_end plain",
    "module.on_fit_end plain",
    "callback.teardown plain",
]

TEST = [
    "callback.setup plain",
    "module.setup plain",
    "module.configure_model plain",
    "module.on_load_checkpoint adapted",
    "callback.on_load_checkpoint adapted",
    "callback.on_test_start adapted",
    "callback.on_test_epoch_start adapted",
    "callback.on_test_batch_start adapted",
    "callback.on_test_batch_end adapted",
    "callback.on_test_epoch_end adapted",
    "callback.on_test_end adapted",
    "callback.teardown plain",  # the merge that was undone for the checkpoint is made again
]


def test_order_of_fit_and_of_a_test_after_it(tmp_path):
    events = []
    module = Recorded(events)
    run = trainer(
        tmp_path, [LoraCallback(CONFIG), Recorder(events), ModelCheckpoint(tmp_path, filename="it")], max_epochs=1
    )
    run.fit(module, loader(samples=8))
    # Lightning calls on_before_zero_grad inside the closure, before backward; its place is not ours to test.
    assert sorted(events) == sorted(FIT)
    assert [e for e in events if "zero_grad" not in e] == [e for e in FIT if "zero_grad" not in e]
    events.clear()
    run.test(module, loader(samples=8), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert events == TEST


def replaced_methods(owner) -> set[str]:
    """The methods of its class in whose place an object has something of its own."""
    return {name for name in vars(owner) if callable(getattr(type(owner), name, None))}


@pytest.mark.parametrize(
    ("stage", "merge"), [("fit", True), ("fit", False), ("test", True)], ids=["merged", "adapted", "test"]
)
def test_nothing_of_lightning_is_patched_and_nothing_stays_but_what_an_adapter_needs(tmp_path, stage, merge):
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

    classes = [pl.Trainer, pl.LightningModule, pl.Callback, Strategy, SingleDeviceStrategy, Classifier]
    before = [dict(vars(cls)) for cls in classes]
    module = Classifier()
    run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=merge)])
    attributes = set(vars(run))
    getattr(run, stage)(module, loader())
    assert [dict(vars(cls)) for cls in classes] == before
    assert set(vars(run)) - attributes <= {"_last_val_time"}  # Lightning's own
    assert replaced_methods(module) == set()
    assert replaced_methods(run.strategy) == (set() if merge else {"save_checkpoint", "load_checkpoint"})


def test_module_that_overrides_nothing_keeps_its_own_methods_after_fit(tmp_path):
    module = Classifier()
    module.configure_optimizers = own = module.configure_optimizers
    trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)]).fit(module, loader())
    assert module.configure_optimizers is own
    assert LoraModel(module).active_adapters == ("default",)


class Copies(Callback):
    """Copies the module while it is fitted, as pickled hyperparameters do that hold a callback of its Trainer."""

    def __init__(self, copied):
        self.copied, self.copies = copied, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.copies.append(self.copied(pl_module))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_module_is_copied_while_it_is_fitted(tmp_path, copied):
    """The copy has the methods of its own."""
    copies, module = Copies(copied), Classifier()
    trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False), copies], max_epochs=1).fit(module, loader())
    last = copies.copies[-1]
    assert not differing(values(last), values(module))
    (optimizer,), _ = last.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held <= {id(p) for p in last.parameters()}
