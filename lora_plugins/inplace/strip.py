"""Removes everything of ours from a layer."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_plugins.inplace.adapted_class import rest
from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.inplace.contents import Contents
from lora_plugins.inplace.layer_state import STATE, layer_state
from lora_plugins.inplace.library_kinds import foreign_kind
from lora_plugins.inplace.library_weights import put_dense_foreign
from lora_plugins.inplace.parametrized import make_plain
from lora_plugins.inplace.stored_weight import stored_weight
from lora_plugins.inplace.storing import replace_stored
from lora_plugins.utils import put_value


def strip_adapters(layer: nn.Module, *, dequantize: bool = False) -> None:
    """Removes all adapters from a layer, whose merged weights stay; safe to repeat if it is interrupted.

    Stored weights with a merged value become dense, or are stored again.
    """
    state, computed = layer_state(layer), {}
    for name, value in state.merged.items():
        parameter = layer._parameters.get(name)
        if stored_weight(layer, name) is not None:
            replace_stored(layer, name, value, dequantize=dequantize)
        elif foreign_kind(parameter) is not None:
            put_dense_foreign(layer, name, value)
        elif parameter is None:
            computed[name] = value
        else:
            put_value(parameter, value)
    with _whole(layer):
        rest(layer)
        for name in [name for name, child in layer._modules.items() if isinstance(child, AdapterTensors)]:
            del layer._modules[name]
        for name, value in computed.items():
            make_plain(layer, name, value)
        del layer.__dict__[STATE]


@contextmanager
def _whole(layer: nn.Module) -> Iterator[None]:
    """Leaves a layer as it was where the block is stopped: with its class, a computed weight has no merged value."""
    computing = layer._modules.get("parametrizations")
    before = Contents([layer, *([] if computing is None else [computing])], [layer._forward_pre_hooks])
    try:
        yield
    except BaseException:
        before.put_back()
        raise
