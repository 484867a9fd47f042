"""The built-in layer plugins, registered through the same door as anyone else's."""

from lora_plugins.layers.attention import MultiheadAttentionPlugin
from lora_plugins.layers.conv import (
    Conv1dPlugin,
    Conv2dPlugin,
    Conv3dPlugin,
    ConvTranspose1dPlugin,
    ConvTranspose2dPlugin,
    ConvTranspose3dPlugin,
    TimmConv2dSamePlugin,
)
from lora_plugins.layers.deformable import DeformConv2dPlugin
from lora_plugins.layers.embedding import EmbeddingPlugin
from lora_plugins.layers.linear import LinearPlugin, TransformersConv1DPlugin
from lora_plugins.layers.recurrent import RecurrentCellPlugin, RecurrentPlugin
from lora_plugins.plugins import LayerRegistrar, hookimpl


@hookimpl
def lora_plugins_register_layers(registrar: LayerRegistrar) -> None:
    """Registers every built-in layer type."""
    for plugin in (
        LinearPlugin(),
        TransformersConv1DPlugin(),
        Conv1dPlugin(),
        Conv2dPlugin(),
        Conv3dPlugin(),
        TimmConv2dSamePlugin(),
        ConvTranspose1dPlugin(),
        ConvTranspose2dPlugin(),
        ConvTranspose3dPlugin(),
        DeformConv2dPlugin(),
        EmbeddingPlugin(),
        MultiheadAttentionPlugin(),
        RecurrentPlugin(),
        RecurrentCellPlugin(),
    ):
        registrar.add(plugin)
