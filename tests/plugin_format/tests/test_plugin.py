"""The conformance kit on the format: one test for each check."""

from lora_plugins_npz import NpzFormat


def test_format(format_check):
    format_check(NpzFormat(), "adapter.npz")
