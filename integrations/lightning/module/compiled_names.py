"""Names without the prefix of `torch.compile`, so that files of compiled and of eager modules are interchangeable.

`self.net = torch.compile(self.net)` inserts a module: `net.0` is then called `net._orig_mod.0`. Files have the plain
name.
"""

from collections.abc import Callable

from torch import nn

from lora_plugins.utils import COMPILED, loaded_key

Rename = Callable[[str], str]


def name_mapper(module: nn.Module) -> Rename:
    """Returns a function from a plain name to the key in the state dict of `module`, whose parts may be compiled."""
    # A part may be kept beside its compiled self, and has a name in both.
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    wrappers = [loaded_key(name) for name in names if name.split(".")[-1] == COMPILED]
    # named_modules gives outer wrappers first, and the names of inner ones contain them.
    prefixes = [(name.removesuffix(COMPILED), f"{name}.") for name in wrappers]

    def rename(name: str) -> str:
        for before, after in prefixes:
            if name.startswith(before) and not name.startswith(after):
                name = after + name.removeprefix(before)
        return name

    return rename
