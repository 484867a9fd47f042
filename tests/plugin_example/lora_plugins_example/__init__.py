"""A plugin for lora_plugins: LoRA on `torch.nn.Bilinear`, and an init with orthonormal rows."""

from lora_plugins import InitRegistrar, LayerRegistrar, hookimpl
from lora_plugins_example.inits import OrthonormalInit
from lora_plugins_example.layers import BilinearPlugin


@hookimpl
def lora_plugins_register_layers(registrar: LayerRegistrar) -> None:
    """Registers the layer type."""
    registrar.add(BilinearPlugin())


@hookimpl
def lora_plugins_register_inits(registrar: InitRegistrar) -> None:
    """Registers the init."""
    registrar.add(OrthonormalInit())
