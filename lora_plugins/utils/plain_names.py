"""Names of modules without the parts that wrappers insert.

`self.net = torch.compile(self.net)` puts a module in between, `net.0` is called `net._orig_mod.0` then; and so do
`checkpoint_wrapper` and FSDP of torch. A name of ours is that of the module without them, whenever they came.
"""

from collections.abc import Iterable

COMPILED = "_orig_mod"
"""The name of a module inside the one that `torch.compile` inserts."""

_OUT_OF_KEYS = {"_checkpoint_wrapped_module": "ActivationWrapper", "_fsdp_wrapped_module": "FullyShardedDataParallel"}
"""Those that take their component out of the keys of state dicts, and put it back where loading reaches them."""

INSERTED = {COMPILED: "OptimizedModule", **_OUT_OF_KEYS}
"""The class of torch that is inserted, by the name of the module inside; not all of them have a public name."""


def plain_name(name: str) -> str:
    """Returns a name without the parts that wrappers insert, as files and configurations have it."""
    return _without(INSERTED, name)


def loaded_key(name: str) -> str:
    """Returns the key of a tensor in a state dict that is about to be loaded into a module, by its name below that.

    What is inserted around that module itself has put its component back already.
    """
    first, _, rest = name.partition(".")
    return f"{first}.{loaded_key(rest)}" if first in _OUT_OF_KEYS else _without(_OUT_OF_KEYS, name)


def _without(inserted: Iterable[str], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in inserted) if "._" in f".{name}" else name
