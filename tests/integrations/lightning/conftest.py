"""What the tests of the Lightning integration share: which warnings of Lightning itself are no concern of ours."""

import pytest

LIGHTNING_WARNINGS = [
    "ignore:.*does not have many workers:UserWarning",  # loaders of tests run in the main process on purpose
    "ignore:The number of training batches:UserWarning",  # shorter than the logging interval, on purpose
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",  # runs of one test share a folder
    "ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning",
    "ignore:.*`training_step` returned `None`:UserWarning",
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning",  # about the default logger
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # lightning 2.6.6 calls what 5.0 will drop
    "ignore:Be aware that when using `ckpt_path`:UserWarning",  # other callbacks than when the file was written
    "ignore:.*\\(ckpt_path=None\\)` was called without a model:UserWarning",  # OnExceptionCheckpoint always warns so
    "ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint:UserWarning",  # likewise
    "ignore:GPU available but not used:UserWarning",
    "ignore:It is recommended to use .self.log.*sync_dist:UserWarning",  # each rank has its own batches, on purpose
]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/integrations" in str(item.path):
            for warning in LIGHTNING_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
