"""The built-in formats pass the kit."""

from lora_plugins.formats.own import OwnFormat
from lora_plugins.formats.peft import PeftFormat


def test_ours(format_check):
    format_check(OwnFormat())


def test_peft(format_check):
    format_check(PeftFormat())
