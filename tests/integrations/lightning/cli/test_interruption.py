"""Ctrl-C at a moment of a fit: what is trained and logged."""

import signal

import pytest

from lora_plugins.integrations.lightning.cli.interruption import Interruption
from tests.integrations.lightning.toys import Classifier, loader, trainer


class Pressed(Classifier):
    """Is interrupted in its second epoch, by the name of a hook, and counts the batches of each epoch."""

    def __init__(self, hook):
        super().__init__()
        self.hook, self.batches = hook, []

    def on_train_epoch_start(self):
        self.batches.append(0)
        self.press("on_train_epoch_start")

    def on_train_batch_start(self, batch, batch_idx):
        self.batches[-1] += 1
        self.press("on_train_batch_start")

    def on_validation_epoch_start(self):
        self.press("on_validation_epoch_start")

    def on_train_epoch_end(self):
        self.press("on_train_epoch_end")

    def press(self, hook):
        if hook == self.hook and self.current_epoch == 1:
            self.hook = ""
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("hook", "left"),
    [
        ("on_train_epoch_start", 1),  # the batch that the epoch needs to be one
        ("on_train_batch_start", 1),
        ("on_validation_epoch_start", 4),
        ("on_train_epoch_end", 4),
    ],
)
def test_no_epoch_without_a_batch_is_logged(tmp_path, hook, left):
    """It had an accuracy of 0, and the loss of the epoch before."""
    interruption, module = Interruption(), Pressed(hook)
    run = trainer(tmp_path, [interruption], max_epochs=9, min_epochs=5)
    with interruption.listening():
        run.fit(module, loader(), loader())
    assert interruption.asked
    assert module.batches == [4, left]
