"""A merge as bytes, to be sent from the process in which `fit` ran to the one that called it."""

import io
import weakref

import torch
from torch import nn

from lora_plugins.files import PackedAdapter
from lora_plugins.integrations.lightning.module.merged_adapters import MergedAdapter
from lora_plugins.integrations.lightning.module.reversible_merge import ReversibleMerge


def merge_as_bytes(merge: ReversibleMerge) -> bytes:
    """Returns all of a merge of dense weights but the module."""
    parts = {
        "base": merge.base,
        "adapters": {
            name: (each.packed.manifest, each.packed.tensors, each.changed, each.kept)
            for name, each in merge.adapters.items()
        },
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
    parts["adapters"] = {
        name: MergedAdapter(PackedAdapter(manifest, tensors), changed, kept)
        for name, (manifest, tensors, changed, kept) in parts["adapters"].items()
    }
    return ReversibleMerge(**parts, stored={}, foreign={}, quantizers={}, target=weakref.ref(target))
