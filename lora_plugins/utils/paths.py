"""Paths of modules and tensors in a model: components with dots between.

Where many names are compared with many others, the few parts of each name are looked up in a set of the others.
"""

from collections.abc import Container


def path_starts(name: str) -> list[str]:
    """Returns a name and those of the modules around it, the longest first, without that of the model itself."""
    starts = [name] if name else []
    while (name := name.rpartition(".")[0]) != "":
        starts.append(name)
    return starts


def path_ends(name: str) -> list[str]:
    """Returns the path ends of a name, the shortest first, the name itself last."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def path_runs(name: str) -> list[str]:
    """Returns all runs of consecutive components of a name, each joined by dots."""
    parts = name.split(".")
    return [".".join(parts[start:end]) for end in range(1, len(parts) + 1) for start in range(end)]


def within(name: str, roots: Container[str]) -> bool:
    """Whether a module or tensor is one of `roots` or lies below one of them, as all does below the model, `""`."""
    return "" in roots or any(start in roots for start in path_starts(name))
