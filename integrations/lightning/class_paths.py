"""`class_path: lora_plugins.LoraConfig` in YAML files of any LightningCLI, for releases of jsonargparse that refuse it.

To be deleted when jsonargparse below 4.53 is not allowed any more: then it takes dataclasses by class path by itself.
"""

from importlib import metadata

from packaging.specifiers import SpecifierSet

from lora_plugins import LoraConfig

_REFUSING = SpecifierSet(">=4.46,<4.53")


def allow_class_path() -> None:
    """Lets jsonargparse take a `LoraConfig` by its class path, as it takes other objects."""
    try:
        refuses = metadata.version("jsonargparse") in _REFUSING
    except metadata.PackageNotFoundError:
        return
    if refuses:
        from jsonargparse import set_parsing_settings  # noqa: PLC0415 -- later ones cost no import

        set_parsing_settings(subclasses_enabled=[LoraConfig])
