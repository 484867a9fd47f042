"""Which call is allowed in which state of a model: one table, which every call consults before it does anything.

A model with adapters is in none, one or several of these conditions:

- `merged`: the update of some adapters is in the weights;
- `in a block`: inside `disable_adapter` or `mixed_batch`, which are taken back when the block ends;
- `in a mixed batch`: the innermost block is a `mixed_batch`;
- `leaving`: `merge_and_unload` was stopped when some layers were merged permanently.

A call that is refused raises a StateError and changes nothing. Everything else about a call (that an adapter of that
name exists, that two adapters do not both train one head) is checked by the call itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Condition = Literal["leaving", "in a block", "in a mixed batch", "merged"]

CONDITIONS: Mapping[Condition, str] = {
    "leaving": "{doing} is not possible: merge_and_unload() was stopped when some layers were merged permanently. Call "
    "it again to merge the others.",
    "in a block": "{doing} is not possible inside {block}. Leave the `with` block first.",
    "in a mixed batch": "{doing} is not possible inside mixed_batch(), which is for inference. Call model.eval() "
    "first.",
    "merged": "{doing} is not possible while {merged} is merged. Call unmerge_adapter() first.",
}
"""By condition, in the order in which they are looked at, what a call that is refused in it says."""


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        doing: What messages call it.
        refused: The conditions in which it is refused.
        effect: What it does, and what it leaves.
    """

    doing: str
    refused: tuple[Condition, ...]
    effect: str


_ALWAYS: tuple[Condition, ...] = ("leaving", "in a block", "merged")
_UNMERGED: tuple[Condition, ...] = ("leaving", "merged")
_OUTSIDE: tuple[Condition, ...] = ("leaving", "in a block")

CALLS: Mapping[str, Call] = {
    "add_adapter": Call("Adding an adapter", _ALWAYS, "Adds an adapter; the first one becomes active and trainable."),
    "set_adapter": Call("Changing the active adapter", _ALWAYS, "Makes the named adapters active, and no other."),
    "swap_adapter": Call("Swapping an adapter's tensors", _ALWAYS, "Gives an adapter the values of a saved one."),
    "delete_adapter": Call("Deleting an adapter", _ALWAYS, "Removes an adapter; the last one as `unload` does."),
    "disable_adapter": Call("Disabling adapters", _UNMERGED, "The base model, until the block ends."),
    "mixed_batch": Call("Mixing adapters in one batch", _UNMERGED, "An adapter for each row, until the block ends."),
    "merge_adapter": Call("Merging for now", _OUTSIDE, "Writes updates of active adapters into the weights."),
    "unmerge_adapter": Call("Unmerging", _OUTSIDE, "Takes merged updates out again, bit for bit."),
    "unload": Call("Unloading", _OUTSIDE, "Removes all adapters: the untouched model, bit for bit."),
    "merge_and_unload": Call("Merging permanently", ("in a block",), "A plain model with the active updates."),
    "save_adapter": Call("Saving an adapter", _UNMERGED, "Changes nothing."),
    "calibrate": Call("Calibrating on the model", _UNMERGED, "Changes nothing."),
    "load_state_dict": Call("Loading a state dict", _ALWAYS, "Loads a state dict of the base, or of the model itself."),
    "train": Call("Training", ("leaving", "in a mixed batch", "merged"), "A forward in training mode, with gradients."),
    "copy": Call("Copying or pickling the model", ("in a block",), "A model of its own, in the same state."),
}
"""All calls by the name of the method."""
