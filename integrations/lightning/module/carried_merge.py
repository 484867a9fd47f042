"""A merge as bytes, to be sent from the process in which `fit` ran to the one that called it."""

import io
import weakref

import torch
from torch import nn

from lora_plugins.files import PackedAdapter
from lora_plugins.integrations.lightning.module.reversible_merge import ReversibleMerge


def merge_as_bytes(merge: ReversibleMerge) -> bytes:
    """Returns all of a merge of dense weights but the module."""
    parts = {
        "base": merge.base,
        "adapters": {name: (packed.manifest, packed.tensors) for name, packed in merge.adapters.items()},
        "changed": merge.changed,
        "kept": merge.kept,
        "active": merge.active,
        "merged": merge.merged,
        "marks": merge.marks,
    }
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    return buffer.getvalue()


def merge_from_bytes(data: bytes, target: nn.Module) -> ReversibleMerge:
    """Returns the merge of a module that has received the merged weights."""
    parts = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    parts["adapters"] = {name: PackedAdapter(*packed) for name, packed in parts["adapters"].items()}
    return ReversibleMerge(**parts, stored={}, foreign={}, quantizers={}, target=weakref.ref(target))
