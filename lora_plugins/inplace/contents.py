"""A snapshot of modules, apart from the values of their tensors, that can be restored."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.inplace.layer_state import STATE

Content = dict[Any, Any]


class Contents:
    """The classes and attributes of modules, and what we know about them.

    Args:
        modules: The modules.
        more: Further dictionaries.
    """

    def __init__(self, modules: Iterable[nn.Module], more: Iterable[Content]) -> None:
        modules = list(modules)
        self._classes = [(module, module.__class__) for module in modules]
        contents = [*(content for module in modules for content in _contents(module)), *more]
        self._contents = [(content, dict(content)) for content in contents]  # DeepSpeed's have no copy()

    def put_back(self) -> None:
        """Restores the modules; safe to repeat if it is interrupted."""
        for content, copy in self._contents:
            content.clear()
            content.update(copy)
        for module, cls in self._classes:
            if module.__class__ is not cls:
                module.__class__ = cls


def _contents(module: nn.Module) -> list[Content]:
    if isinstance(module, AdapterTensors):
        return [module._parameters]
    if isinstance(module, ScriptModule):  # is never adapted, and has no dictionaries of Python
        return []
    attributes = vars(module)
    found: list[Content] = [attributes, module._modules, module._parameters, module._buffers]
    found.append(module._load_state_dict_pre_hooks)
    if (layer := attributes.get(STATE)) is not None:
        found += [vars(layer), layer.adapters, layer.merged, layer.kept]
    return found
