"""The built-in init plugins, registered through the same door as anyone else's."""

from lora_plugins.inits.eva import EvaInit
from lora_plugins.inits.gaussian import GaussianInit
from lora_plugins.inits.kaiming import KaimingInit
from lora_plugins.inits.loftq import LoftQInit
from lora_plugins.inits.lora_ga import LoraGaInit
from lora_plugins.inits.none import NoneInit
from lora_plugins.inits.olora import OloraInit
from lora_plugins.inits.orthogonal import OrthogonalInit
from lora_plugins.inits.pissa import PissaInit
from lora_plugins.plugins import InitRegistrar, hookimpl


@hookimpl
def lora_plugins_register_inits(registrar: InitRegistrar) -> None:
    """Registers every built-in init."""
    for plugin in (
        KaimingInit(),
        GaussianInit(),
        LoftQInit(),
        PissaInit(),
        OloraInit(),
        OrthogonalInit(),
        EvaInit(),
        LoraGaInit(),
        NoneInit(),
    ):
        registrar.add(plugin)
