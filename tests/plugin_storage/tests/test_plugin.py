"""The conformance kit on the storage: one test for each check."""

from lora_plugins_fp8 import Fp8Storage


def test_storage(storage_check):
    storage_check(Fp8Storage())
