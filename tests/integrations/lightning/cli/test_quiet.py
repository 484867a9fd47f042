"""What a run prints beside its own lines."""

import warnings

import lightning  # noqa: F401 -- its import sets a format of warnings

from lora_plugins.integrations.lightning.cli.quiet import quiet


def test_a_warning_is_said_without_the_code_that_it_comes_from():
    before = warnings.formatwarning
    with quiet():
        assert warnings.formatwarning("a small split", UserWarning, "file.py", 3) == "warning: a small split\n"
    assert warnings.formatwarning is before
