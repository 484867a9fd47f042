"""The sections `optimizer:` and `lr_scheduler:`."""

import pytest

from lora_plugins.cli.main import main

pytestmark = [
    # The point of the section `optimizer:`.
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning"),
]


def test_a_scheduler_alone_is_refused(config, capsys, tmp_path):
    """Lightning would pass it over, and train at a constant rate."""
    assert main(["fit", "--config", config(optimizer=None)]) == 1
    assert "a section `lr_scheduler:` without `optimizer:`, and Lightning passes it over" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_scheduler_alone_does_not_matter_where_nothing_is_trained(config):
    assert main(["validate", "--config", config(optimizer=None, lora=None)]) == 0


def test_both_together_train(config, tmp_path):
    assert main(["fit", "--config", config()]) == 0
    assert (tmp_path / "adapter").is_dir()
