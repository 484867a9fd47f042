"""Weights that a module computes with itself, in place of calling the layer that has them.

The attention of Swin of torchvision calls `F.linear(x, self.qkv.weight, bias)`, and SAM takes its tokens as
`self.mask_tokens.weight`. No file and no model says so, only the source of the forward.
"""

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

from lora_plugins.inplace import TELLING, base_class_of, full_name, is_of_torch, model_modules

_ASKING = frozenset({"isinstance", "to", "type_as"})
"""Functions and methods that ask a tensor for its type and device."""


def weights_read(model: nn.Module) -> dict[str, str]:
    """Returns the class that computes with the weight of a layer itself, by the name of the layer.

    Told by what forwards themselves say; those without a source, and those of torch, are left out.
    """
    classes = [(entry.name, base_class_of(entry.module)) for entry in model_modules(model)]
    paths = {cls: _paths(cls) for cls in {cls for _, cls in classes} if not is_of_torch(cls)}
    return {full_name(name, path): cls.__name__ for name, cls in classes for path in paths.get(cls, ())}


def _paths(cls: type[nn.Module]) -> frozenset[str]:
    """Returns the paths, from a module of a class on, whose `weight` its forward computes with."""
    nodes = _nodes(cls)
    told = {id(each) for node in nodes for each in _told(node)}
    read = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "weight"]
    return frozenset(path for node in read if id(node) not in told and (path := _path(node.value)))


def _nodes(cls: type[nn.Module]) -> list[ast.AST]:
    """Returns the syntax of the forward and of the methods that it calls."""
    found: list[ast.AST] = []
    pending, seen = ["forward"], set[str]()
    while pending:
        name = pending.pop()
        method = getattr(cls, name, None)
        if name in seen or not inspect.isfunction(method):
            continue
        seen.add(name)
        with contextlib.suppress(OSError, SyntaxError):
            nodes = [*ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))]
            pending += [path for node in nodes if (path := _path(node))]
            found += nodes
    return found


def _told(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the expressions of which a node reads only the type or the shape."""
    if isinstance(node, ast.Attribute) and node.attr in TELLING:
        yield node.value
    elif isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        yield from node.args if name in _ASKING else ()


def _path(node: ast.AST) -> str:
    """Returns `a.0.b` for `self.a[0].b`; empty for anything else."""
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
