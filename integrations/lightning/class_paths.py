"""`class_path: lora_plugins.LoraConfig` in YAML files of any LightningCLI, for releases of jsonargparse that refuse it.

To be deleted when jsonargparse below 4.53 is not allowed any more: then it takes dataclasses by class path by itself.
"""

import sys
from importlib import metadata

from packaging.version import Version

from lora_plugins import LoraConfig


def allow_class_path() -> None:
    """Lets a jsonargparse that is imported take a `LoraConfig` by its class path, as it takes other objects."""
    jsonargparse = sys.modules.get("jsonargparse")
    if jsonargparse is not None and Version(metadata.version("jsonargparse")) < Version("4.53"):
        jsonargparse.set_parsing_settings(subclasses_enabled=[LoraConfig])
