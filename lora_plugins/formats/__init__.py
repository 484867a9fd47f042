"""The built-in formats of adapter files, registered through the same door as anyone else's.

None of them imports the library that it is named after. A format of layers with an A and a B is a `PortableFormat`,
which needs to know names and nothing of models.
"""

from lora_plugins.formats.comfyui import ComfyFormat
from lora_plugins.formats.components import COMPONENTS
from lora_plugins.formats.converted import convert
from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.kohya import KohyaFormat
from lora_plugins.formats.own import OwnFormat
from lora_plugins.formats.peft import PeftFormat
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.portable_format import PortableFormat, UntoldError
from lora_plugins.plugins import FormatRegistrar, hookimpl
from lora_plugins.utils import replace_files

__all__ = [
    "COMPONENTS",
    "PortableAdapter",
    "PortableFormat",
    "PortableLayer",
    "UntoldError",
    "convert",
    "replace_files",
]


@hookimpl
def lora_plugins_register_formats(registrar: FormatRegistrar) -> None:
    """Registers every built-in format."""
    for plugin in (OwnFormat(), PeftFormat(), DiffusersFormat(), KohyaFormat(), ComfyFormat()):
        registrar.add(plugin)
