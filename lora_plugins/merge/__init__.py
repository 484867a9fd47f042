"""Merging: updates written into the weights, either permanently or reversibly bit for bit.

What rounding takes from an update is measured, and a merge that would lose too much of one is refused.
"""

from lora_plugins.merge.merge_adapter import DEFAULT_MAX_ERROR, MergedWeight, MergeReport, merge, unmerge
from lora_plugins.merge.merge_and_unload import merge_and_unload
from lora_plugins.merge.merge_later import check_merge_later

__all__ = [
    "DEFAULT_MAX_ERROR",
    "MergeReport",
    "MergedWeight",
    "check_merge_later",
    "merge",
    "merge_and_unload",
    "unmerge",
]
