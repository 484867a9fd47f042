"""Group offloading of diffusers, which takes tensors from copies in each forward: what is put in their place is lost.

The copies are files, or memory that is pinned for transfers beside the computation (`use_stream`).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import NamedModule

BEFORE = "Do it before enable_group_offload, or in a pipeline without."
"""What to do about a call that group offloading stands in the way of."""


def modules_on_disk(modules: Sequence[NamedModule]) -> list[str]:
    """Returns the names of modules whose tensors are in files until their forward, and have no values in memory."""
    return [entry.name for entry in modules if _is_on_disk(_group_of(entry.module))]


def check_no_copies(modules: Sequence[NamedModule], doing: str) -> None:
    """Refuses what changes tensors of a model, or adds some, where the next forward takes them from copies.

    Raises:
        StateError: If group offloading has such copies.
    """
    groups = [(entry.name, _group_of(entry.module)) for entry in modules]
    copied = [name for name, group in groups if _is_on_disk(group) or getattr(group, "cpu_param_dict", None)]
    if copied:
        raise StateError(
            f"{doing} is not possible while group offloading of diffusers takes the tensors of {listing(copied, 3)} "
            f"from copies of its own in each forward. {BEFORE}"
        )


def _group_of(module: nn.Module) -> Any:
    """Returns the group of modules that are offloaded together with a module; None where it is not offloaded."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return getattr(hooks.get("group_offloading"), "group", None)


def _is_on_disk(group: Any) -> bool:
    return getattr(group, "offload_to_disk_path", None) is not None
