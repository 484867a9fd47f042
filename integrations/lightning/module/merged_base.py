"""Weights that hold the update of an adapter which an earlier `fit` merged, and what else it trained.

An adapter that is trained on them belongs to them and not to the pretrained ones, so its checkpoints hold them. Each
layer remembers the checksums of its merged weights, and of what they are rounded to where a module is cast; as soon as
they have other values, they are a base like any other. It also remembers the fingerprints of the pretrained ones, which
tell the base that such a checkpoint leaves out.
"""

from collections.abc import Collection, Mapping

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.errors import counted, listing
from lora_plugins.inplace import full_name, holder_of, model_modules, named_tensors, own_tensor, submodule
from lora_plugins.integrations.lightning.module.bitwise import checksum, local
from lora_plugins.integrations.lightning.module.frozen_parts import Fingerprint

_MERGED = "_lora_merged"

_CASTS = (torch.float32, torch.bfloat16, torch.float16)
"""The types that precision plugins, and users, cast modules to, where that may round: float64 takes any value."""

Sums = dict[torch.dtype, int]
"""The checksums of a weight by type."""

MergeMarks = dict[str, dict[str, tuple[Sums, Fingerprint]]]
"""By the name of a layer, the checksums of each of its merged weights, and the fingerprint of the pretrained one."""


def mark_merged(target: nn.Module, pretrained: Mapping[str, Fingerprint]) -> None:
    """Marks weights of a module, with their present values, as merged ones.

    `pretrained` has, by name, the fingerprint of each before the merge; empty where it is not known.
    """
    for name, values in pretrained.items():
        layer, key = holder_of(target, name)
        layer.__dict__.setdefault(_MERGED, {})[key] = _sums(own_tensor(target, name)), values


def merged_weights(target: nn.Module) -> dict[str, Fingerprint]:
    """Returns the weights that are marked as merged and have not changed since.

    Returns:
        By name, the fingerprints of the pretrained ones.
    """
    marks = {full_name(name, key): mark for name, own in merge_marks(target).items() for key, mark in own.items()}
    weights = named_tensors(target, aliases=True) if marks else {}
    return {name: values for name, (sums, values) in marks.items() if name in weights and _has(weights[name], sums)}


def merge_marks(target: nn.Module) -> MergeMarks:
    """Returns the marks of the layers of a module, as they are now."""
    marks = {entry.name: entry.module.__dict__.get(_MERGED, {}) for entry in model_modules(target)}
    return {name: dict(own) for name, own in marks.items() if own}


def _sums(weight: Tensor) -> Sums:
    own, casts = local(weight), _CASTS if weight.is_floating_point() else ()
    types = {own.dtype, *(dtype for dtype in casts if dtype.itemsize <= own.dtype.itemsize)}
    return {dtype: checksum(own.to(dtype)) for dtype in types}


def _has(weight: Tensor, sums: Sums) -> bool:
    """Whether a weight has the merged values, or what they were rounded to, whatever type holds these now."""
    own = local(weight)
    if checksum(own) == sums.get(own.dtype):
        return True
    casts = {dtype: own.to(dtype) for dtype in sums}
    return any(torch.equal(cast.to(own), own) and checksum(cast) == sums[dtype] for dtype, cast in casts.items())


def set_merge_marks(target: nn.Module, marks: MergeMarks) -> None:
    """Gives the layers of a module these marks and no others."""
    for layer in target.modules():
        layer.__dict__.pop(_MERGED, None)
    for name, own in marks.items():
        submodule(target, name).__dict__[_MERGED] = dict(own)


def check_merged_base(merged: Collection[str], name: str, files: str | None) -> None:
    """Warns that a new adapter would be one of weights that an earlier one was merged into.

    `files` is what makes an adapter that cannot be loaded again without these weights; None if nothing does.

    Raises:
        StateError: If something does.
    """
    found = (
        f"{counted(len(merged), f'weight of {name} is one', f'weights of {name} are those')} that an adapter was "
        f"merged into when an earlier fit ended: {listing(merged, 3)}. A new adapter belongs to them, not to the "
        "pretrained ones. To go on with the earlier one, give fit the same LoraCallback; to start anew, make the "
        "module again."
    )
    if files is not None:
        raise StateError(
            f"{found} With {files} it could not be loaded again, since no file has those weights. Leave that "
            "out, and use export_to, or checkpoints, which hold them."
        )
    rank_zero_warn(f"{found} Its checkpoints hold these weights as well.")
