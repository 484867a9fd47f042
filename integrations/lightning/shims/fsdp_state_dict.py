"""A use of `FSDPStrategy._state_dict_type` of Lightning 2.6.6, which holds the argument `state_dict_type`.

Without it, full state dicts of FSDP are not refused, and what becomes of an adapter in them has not been checked.
"""

from lightning.pytorch.strategies import FSDPStrategy


def saves_shards(strategy: FSDPStrategy) -> bool:
    """Whether the strategy saves a file for each process, and not full state dicts."""
    return strategy._state_dict_type == "sharded"
