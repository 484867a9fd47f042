"""Names without what `torch.compile` inserts.

`self.net = torch.compile(self.net)` puts a module in between: `net.0` is called `net._orig_mod.0` then.
"""

COMPILED = "_orig_mod"
"""The name of that module."""


def plain_name(name: str) -> str:
    """Returns a name without what `torch.compile` inserts, as files and configurations have it."""
    return ".".join(part for part in name.split(".") if part != COMPILED) if COMPILED in name else name
