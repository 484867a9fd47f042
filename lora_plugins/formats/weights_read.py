"""Weights that a module computes with itself, in place of calling the layer that has them.

The attention of Swin of torchvision calls `F.linear(x, self.qkv.weight, bias)`, and SAM takes its tokens as
`self.mask_tokens.weight`. No file and no model says so, only the source of the forward.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from lora_plugins.inplace import base_class_of, full_name, is_of_torch, model_modules

_TELLING = frozenset(
    {
        *("device", "dtype", "is_cpu", "is_cuda", "layout", "ndim", "requires_grad", "shape"),
        *("dim", "get_device", "is_floating_point", "numel", "size"),
    }
)
"""Attributes and methods that say nothing of the values."""

_ASKING = frozenset({"isinstance", "to", "type_as"})
"""Functions and methods that ask a tensor for its type and device."""


def weights_read(model: nn.Module) -> dict[str, str]:
    """Returns the class that computes with the weight of a layer itself, by the name of the layer.

    Told by what forwards themselves say; those without a source, and those of torch, are left out.
    """
    found: dict[str, str] = {}
    for entry in model_modules(model):
        cls = base_class_of(entry.module)
        if inspect.isfunction(cls.forward) and not is_of_torch(cls):
            found |= {full_name(entry.name, path): cls.__name__ for path in _paths(cls.forward)}
    return found


@functools.cache
def _paths(forward: FunctionType) -> frozenset[str]:
    """Returns the paths, from a module on, whose `weight` its forward computes with."""
    try:
        nodes = [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward))))]
    except (OSError, SyntaxError):
        return frozenset()
    told = {id(each) for node in nodes for each in _told(node)}
    read = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "weight"]
    return frozenset(path for node in read if id(node) not in told and (path := _path(node.value)))


def _told(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what is only asked for its type and shape."""
    if isinstance(node, ast.Attribute) and node.attr in _TELLING:
        yield node.value
    elif isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        yield from node.args if name in _ASKING else ()


def _path(node: ast.expr) -> str:
    """Returns `a.0.b` of `self.a[0].b`; empty of anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
        elif isinstance(node.slice, ast.Constant):
            parts.insert(0, str(node.slice.value))
        else:
            return ""
        node = node.value
    return ".".join(parts) if isinstance(node, ast.Name) and node.id == "self" else ""
