"""The base of a checkpoint: put into the module where adapters were merged into it, else compared with its own."""

from collections.abc import Mapping, Set
from contextlib import ExitStack
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import AdapterFileError
from lora_plugins.errors import listing
from lora_plugins.files import fingerprint, same
from lora_plugins.inplace import named_tensors, own_tensor
from lora_plugins.integrations.lightning.module import (
    adapters_by_place,
    built_alike,
    mark_merged,
    merged_weights,
    moved_by_hand,
    not_as_built,
)


def put_base(module: nn.Module, entry: Mapping[str, Any], saved: Mapping[str, Tensor], undo: ExitStack) -> None:
    """Puts the weights of a checkpoint that adapters were merged into before into the module.

    `undo` gets calls that restore the former weights.

    Raises:
        AdapterFileError: If the module has another base.
    """
    keys, pretrained = entry.get("base", []), entry.get("pretrained", {})
    found = named_tensors(module, aliases=True)
    _check_base(module, found, keys, pretrained, saved)
    for name in keys:  # before another name of one is written
        undo.callback(_put_back_base, module, name, found[name].detach().clone())
    for name in keys:
        found[name].data.copy_(saved[name])
    if keys:
        mark_merged(module, {name: pretrained.get(name, {}) for name in keys})
        for adapter in adapters_by_place(module).values():
            adapter.fingerprints.clear()  # of the base that was


def _check_base(
    module: nn.Module,
    found: Mapping[str, Tensor],
    keys: list[str],
    pretrained: Mapping[str, dict[str, float]],
    saved: Mapping[str, Tensor],
) -> None:
    """Checks that the module has the base whose weights an adapter was merged into before."""
    own = merged_weights(module)
    merged = own.keys() - saved.keys()
    if merged:
        raise AdapterFileError(
            f"The checkpoint was trained on another base: an adapter was merged into {listing(sorted(merged), 3)} of "
            "this module when an earlier fit ended. Make the module again, or give the trainer the same LoraCallback."
        )
    for name in keys:
        if name not in found or found[name].shape != saved[name].shape:
            raise AdapterFileError(
                f"The checkpoint was trained on another base: {type(module).__name__} has no {name!r} of shape "
                f"{list(saved[name].shape)}."
            )
    other = [name for name in pretrained if not torch.equal(found[name], saved[name].to(found[name]))]
    before = {name: own[name] if name in own else fingerprint(found[name]) for name in other}
    wrong = [name for name, values in before.items() if values and not same(values, pretrained[name])]
    if wrong:
        raise AdapterFileError(
            f"The checkpoint was trained on another base: {listing(wrong)} differ from the pretrained weights that an "
            f"adapter was merged into before ({len(wrong)} of {len(before)} weights). The checkpoint has the merged "
            "ones, and leaves the rest of that base out: load its own pretrained weights first, unmerged."
        )


def check_left_out(module: nn.Module, entry: Mapping[str, Any], *, keep_moved: bool) -> None:
    """Checks that what a checkpoint leaves out has the values that it had when the checkpoint was written.

    Raises:
        AdapterFileError: If it has others.
    """
    expected = entry.get("outside", {})
    other, built = not_as_built(module, expected), built_alike(module, expected)
    _check_moved(module, built.intersection(other) | moved_by_hand(module).intersection(entry["left_out"]), keep_moved)
    wrong = [name for name in other if name not in built]
    if wrong:
        raise AdapterFileError(
            f"The checkpoint leaves {listing(wrong, 3)} out ({len(wrong)} frozen tensors outside of the target), and "
            f"{type(module).__name__} has other values there than the module that was trained had by then. Build it "
            "with the same values: the same pretrained weights, or the same seed if they are random."
        )


def _check_moved(module: nn.Module, moved: Set[str], keep: bool) -> None:
    """Names what a checkpoint leaves out since it was frozen, and this very module has moved by hand since."""
    if not moved:
        return
    told = (
        f"The checkpoint was written before this {type(module).__name__} moved {listing(sorted(moved), 3)} by hand, as "
        "the average of a teacher, and leaves that out: there are other values there"
    )
    if not keep:
        raise AdapterFileError(f"{told} now. Load the checkpoint into a new module.")
    rank_zero_warn(f"{told} than it was measured with. They are kept; all else is that of the checkpoint.")


def _put_back_base(module: nn.Module, name: str, value: Tensor) -> None:
    own_tensor(module, name).data.copy_(value)
