"""Modules that belong to adapters of other libraries: they are trained or merged there, and never adapted by "all".

PEFT's modules list the children that hold adapters; those of other libraries are recognized by their usual names.
"""

import re
from collections.abc import Sequence

from lora_plugins.inplace import NamedModule, full_name
from lora_plugins.utils import within

_ADAPTER = re.compile(r"loras|lora_(A|B|E|a|b|up|down|mid|layer|embedding_[AB]|magnitude_vector)")
"""Components of a path that mean an adapter."""

_CHILDREN = "adapter_layer_names"
"""Attribute of the classes of PEFT's layers and wrappers: the names of the children that are the adapters'."""

_BASE = "base_layer"
"""Child of a layer of PEFT that is the layer of before, which "all" means in its place."""

_UNUSED = "original_module"
"""Child of a wrapper of PEFT that its trained copy stands in for."""


def foreign_names(modules: Sequence[NamedModule]) -> set[str]:
    """Returns the names of the modules that are of other libraries' adapters, or wrap a layer for one."""
    of_peft = [entry for entry in modules if hasattr(type(entry.module), _CHILDREN)]
    roots = {
        full_name(name, child)
        for entry in of_peft
        for child in (*getattr(type(entry.module), _CHILDREN), _UNUSED)
        for name in entry.names
    }
    wrappers = {name for entry in of_peft if _BASE in entry.module._modules for name in entry.names}
    names = [name for entry in modules for name in entry.names]
    by_name = {name for name in names if any(map(_ADAPTER.fullmatch, name.split(".")))}
    return wrappers | by_name | {name for name in names if within(name, roots)}
