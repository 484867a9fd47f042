"""Which classes compute the same: subclasses that only build their layer in another way."""

from torch import nn

from lora_plugins.plugins.kind import class_path


class _Empty(nn.Module):
    """Has what every class has that changes nothing."""

    number: int

    def __init__(self) -> None:
        super().__init__()
        self.number = 0


_HARMLESS = frozenset({*vars(_Empty), "__constants__", "__repr__", "_version", "extra_repr", "reset_parameters"})
"""Names that a class may have anew without computing anything else."""


def computes_as(cls: type) -> tuple[str, ...]:
    """Returns the import paths of a module class and of those of its bases that compute the same.

    A class computes as its one base does if it changes nothing that the base has: what it adds, the base does not call.
    """
    paths = [class_path(cls)]
    while len(cls.__bases__) == 1 and all(_adds(cls, name) for name in vars(cls)):
        cls = cls.__bases__[0]
        paths.append(class_path(cls))
    return tuple(paths)


def _adds(cls: type, name: str) -> bool:
    return name in _HARMLESS or not hasattr(cls.__base__, name)
