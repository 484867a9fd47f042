"""What a run prints beside its own lines."""

import logging
import warnings

import lightning  # noqa: F401 -- its import sets a format of warnings

from lora_plugins.integrations.lightning.cli.noise import quiet


def test_a_warning_is_said_without_the_code_that_it_comes_from():
    before = warnings.formatwarning
    with quiet():
        assert warnings.formatwarning("a small split", UserWarning, "file.py", 3) == "warning: a small split\n"
    assert warnings.formatwarning is before


def test_what_a_library_says_of_its_own_import_is_left_out(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)  # or pytest 8.0 sees nothing of torch's
    trees, torchao = (logging.getLogger(name) for name in ("torch.utils._pytree", "torchao"))
    with quiet(), caplog.at_level(logging.WARNING):
        trees.warning("<enum 'KernelPreference'> ... Calling register_constant() on Enum subclasses is deprecated")
        torchao.warning("Failed to load /site-packages/torchao/_C_cutlass_90a.abi3.so: Could not load this library")
        trees.warning("something else")
        torchao.warning("Failed to quantize")
    assert {record.getMessage() for record in caplog.records} == {"something else", "Failed to quantize"}
