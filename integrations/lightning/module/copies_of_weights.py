"""Finds copies of weights in lists, dicts, buffers and hidden modules, as hand-written averages keep them.

They were made before there were adapters, so they have no A and B: an average of them would never learn.
"""

from collections.abc import Iterator, Mapping, ValuesView
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_plugins.adapter import adapted_layers
from lora_plugins.inplace import full_name, named_parameters
from lora_plugins.integrations.lightning.module.adapted_parts import adapted_weights
from lora_plugins.integrations.lightning.module.bitwise import checksum

_OF_LIGHTNING = frozenset({*vars(LightningModule()), "_hparams", "_hparams_initial"})
"""Attributes of every LightningModule, and two of `save_hyperparameters`, whose values may be networks."""
_LIBRARIES = ("torch", "lightning", "lora_plugins", "torchmetrics", "builtins")


def kept_copies(module: nn.Module) -> dict[str, list[Tensor]]:
    """Returns the copies of adapted weights that a module keeps, by the name of the collection that has them.

    A collection counts if it has the values of two adapted weights, or of all that there are.
    """
    owned, adapted = named_parameters(module, aliases=True), adapted_weights(module)
    weights = {id(owned[name]): owned[name] for name in adapted if name in owned and owned[name].dim() > 1}
    sums = {(tensor.shape, tensor.dtype, checksum(tensor)) for tensor in weights.values()}
    shapes = {(shape, dtype) for shape, dtype, _ in sums}
    found = {}
    for name, tensors in _collections(module):
        alike = [t for t in tensors if (t.shape, t.dtype) in shapes and id(t) not in weights]
        keys = [(t.shape, t.dtype, checksum(t)) for t in alike]
        equal = {*keys} & sums
        if equal and len(equal) >= min(2, len(sums)):
            found[name] = [tensor for key, tensor in zip(keys, alike, strict=True) if key in equal]
    return found


def _collections(module: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    for path, part in module.named_modules():
        yield path, list(_tensors(part._buffers))
        for name, value in vars(part).items():
            if name in _OF_LIGHTNING:
                continue
            full = full_name(path, name)
            yield full, list(_tensors(value))
            if _is_helper(value):
                yield from ((f"{full}.{own}", list(_tensors(each))) for own, each in vars(value).items())


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yields the tensors of a collection, and of modules in it that the holder does not register."""
    members = values.values() if isinstance(values, Mapping) else values
    for value in members if isinstance(members, list | tuple | ValuesView) else [values]:
        if isinstance(value, nn.Module) and not adapted_layers(value):
            yield from value.parameters()
        elif isinstance(value, Tensor) and value is not values:
            yield value


def _is_helper(value: Any) -> bool:
    known = isinstance(value, nn.Module | Optimizer | type) or type(value).__module__.split(".")[0] in _LIBRARIES
    return not known and hasattr(value, "__dict__")
