"""A layer type under a name of its own, for a class that a built-in plugin serves."""

from torch import nn

from lora_plugins import RowMajorPlugin, hookimpl


class OtherLinear(RowMajorPlugin):
    """Claims `torch.nn.Linear`."""

    name = "other_linear"
    module_type = nn.Linear


@hookimpl
def lora_plugins_register_layers(registrar):
    """Registers the layer type."""
    registrar.add(OtherLinear())
