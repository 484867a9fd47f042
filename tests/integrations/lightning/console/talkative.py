"""A module that says a line wherever it can, and takes its time."""

import logging
import sys
import time
import warnings

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from tests.integrations.lightning.toys import Classifier

SAID = ("printed", "to stderr", "logged", "warned", "at the end of training", "at the end of fit", "at teardown")


class Talkative(Classifier):
    def __init__(self, seconds: float = 0.0, **options) -> None:
        super().__init__(**options)
        self.seconds = seconds

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            print("said: printed")
            print("said: to stderr", file=sys.stderr)
            rank_zero_info("said: logged")
            message = f"said: {SAID[3]}"  # the source line, which Python prints too, does not hold it
            warnings.warn(message, stacklevel=1)

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        logging.getLogger("lightning.pytorch").info("said: at the end of training")


class Last(Callback):
    def on_fit_end(self, trainer, pl_module):
        print("said: at the end of fit")

    def teardown(self, trainer, pl_module, stage):
        print("said: at teardown")
