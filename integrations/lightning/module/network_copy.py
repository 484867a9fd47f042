"""What is known of a part of a module that is a copy of another one."""

from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from lora_plugins.inplace import submodule


@dataclass(frozen=True)
class NetworkCopy:
    """A part of a module that has the parameters of another part, some layers of which are adapted.

    Args:
        origin: The name of the other part.
        name: The name of the copy, which follows the origin.
        equal: Whether the values of what neither trains are the same, bit for bit.
        began_equal: Whether they are, or were it before earlier fits merged adapters into them.
        frozen: Whether the author froze the copy, and not the origin.
        shares: Whether it has some of the origin's own modules.
    """

    origin: str
    name: str
    equal: bool
    began_equal: bool
    frozen: bool
    shares: bool = False

    @property
    def is_directed(self) -> bool:
        """Whether it is known which part follows the other; for two equal trainable ones it is not."""
        return self.frozen or self.shares or not self.equal

    @property
    def followers(self) -> tuple[str, ...]:
        """The names of the parts of which one follows the other."""
        return (self.name,) if self.is_directed else (self.name, self.origin)


def are_repeated(module: nn.Module, first: str, second: str) -> bool:
    """Whether two parts belong to members of one list, as the layers that `nn.TransformerEncoder` clones."""
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False)))
    return isinstance(submodule(module, ".".join(name for name, _ in shared)), nn.ModuleList | nn.Sequential)
