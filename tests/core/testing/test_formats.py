"""The built-in formats pass the kit."""

from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.kohya import KohyaFormat
from lora_plugins.formats.own import OwnFormat
from lora_plugins.formats.peft import PeftFormat


def test_ours(format_check):
    format_check(OwnFormat())


def test_peft(format_check):
    format_check(PeftFormat())


def test_diffusers(format_check):
    format_check(DiffusersFormat(), options={"component": "unet"})


def test_kohya(format_check):
    format_check(KohyaFormat(), "adapter.safetensors", options={"component": "unet"})
