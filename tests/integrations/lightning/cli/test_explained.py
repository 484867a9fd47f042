"""What is said of errors that a run ends with."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.integrations.lightning.cli.explained import explained_run
from tests.integrations.lightning.toys import Classifier, trainer


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


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="must match"), explained_run():
        torch.zeros(2) + torch.zeros(3)
