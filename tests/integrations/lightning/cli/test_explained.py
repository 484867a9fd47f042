"""What is said of errors that a run ends with."""

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from lora_plugins import ConfigError
from lora_plugins.integrations.lightning.cli.explained import explained_run
from tests.integrations.lightning.toys import Classifier, loader, trainer


def of_torch():
    torch.empty(2**60, dtype=torch.uint8)


def of_python():
    raise MemoryError


@pytest.mark.parametrize(
    ("run", "said"),
    [(of_torch, r": can't allocate memory: you tried to allocate \d+ bytes"), (of_python, "")],
    ids=["torch", "Python"],
)
def test_too_little_memory_of_a_cpu_is_one_message_with_what_to_take(run, said):
    match = rf"memory of the device is too small{said}\. Take a smaller --batch-size"
    with pytest.raises(ConfigError, match=match), explained_run():
        run()


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning")  # of Lightning, before the error
@pytest.mark.parametrize(("method", "loader"), [("fit", "train_dataloader"), ("validate", "val_dataloader")])
def test_where_there_is_no_data_it_is_said_where_it_belongs(method, loader, tmp_path):
    match = f"Neither the data nor the module has a {loader}. Name a data module with one by `data:`"
    with pytest.raises(ConfigError, match=match), explained_run():
        getattr(trainer(tmp_path, []), method)(Classifier())


class Stepped(Classifier):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        (optimizer,), _ = super().configure_optimizers()
        return [optimizer], [self.make(optimizer)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(lr_scheduler.CosineAnnealingLR, T_max=0), "CosineAnnealingLR .*: T_max"),
        (partial(lr_scheduler.StepLR, step_size=0), "StepLR .*: step_size"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9, div_factor=0), "OneCycleLR .*: div_factor"),
    ],
    ids=["in a step", "after a while", "at once"],
)
def test_a_scheduler_that_divides_by_zero_is_named_with_its_arguments(make, said, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{said}\. Give the number that is meant"), explained_run():
        trainer(tmp_path, [], max_epochs=3).fit(Stepped(make), loader())


@pytest.mark.parametrize(
    ("run", "error", "said"),
    [
        (lambda: torch.zeros(2) + torch.zeros(3), RuntimeError, "must match"),
        (lambda: 1 / 0, ZeroDivisionError, "division"),
    ],
    ids=["of torch", "of the user"],
)
def test_other_errors_pass(run, error, said):
    with pytest.raises(error, match=said), explained_run():
        run()
