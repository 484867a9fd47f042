"""Merging: updates written into the weights, either permanently or reversibly bit for bit.

What a merge loses to rounding is measured, and refused where it is too much and worth something.
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
