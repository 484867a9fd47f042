"""What a run prints beside its own lines."""

import logging
import warnings

import lightning  # noqa: F401 -- its import sets a format of warnings

from lora_plugins.integrations.lightning.cli.quiet import quiet


def test_a_warning_is_said_without_the_code_that_it_comes_from():
    before = warnings.formatwarning
    with quiet():
        assert warnings.formatwarning("a small split", UserWarning, "file.py", 3) == "warning: a small split\n"
    assert warnings.formatwarning is before


def test_what_a_library_says_of_its_own_import_is_left_out(caplog):
    logger = logging.getLogger("torch.utils._pytree")
    with quiet(), caplog.at_level(logging.WARNING, logger.name):
        logger.warning("<enum 'KernelPreference'> ... Calling register_constant() on Enum subclasses is deprecated")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
