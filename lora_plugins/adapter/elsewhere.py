"""Models whose tensors are offloaded, fused or sharded: forwards work, and calls that need the tensors are refused.

FSDP and tensor parallelism of torch, and ZeRO-3 of DeepSpeed, split them over processes. accelerate keeps them in other
memory or in files, and leaves them on the meta device until a layer is called; diffusers leaves memory without values
of those on the disk, and computes with copies of projections that were fused.
"""

from collections.abc import Iterable

from torch import nn

from lora_plugins.adapter.group_offloading import BEFORE, check_no_copies, modules_on_disk
from lora_plugins.adapter.lifecycle import CALLS
from lora_plugins.adapter.owned_tensors import IF_OFFLOADED
from lora_plugins.adapter.state import adapted_layers, present_state
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import holder_of, is_shard, model_modules, own_parameters

_FUSED = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})
"""The layers of an attention of diffusers that are not called once they are fused."""


def check_here(model: nn.Module, call: str) -> None:
    """Refuses a call of `lifecycle.CALLS` in a state of an adapted model, or while its tensors are offloaded.

    Raises:
        StateError: If the table refuses the call; if parameters of the model are split over processes, on the meta
            device, or on the disk; or if the call changes tensors that each forward takes from copies.
    """
    present_state(model).check(call)
    modules = model_modules(model)
    own = own_parameters(modules)
    _check_whole(model, own, call)
    if away := [name for name, parameter in own.items() if parameter.is_meta]:
        raise StateError(
            f"{CALLS[call].doing} needs tensors with values, and {listing(away, 3)} are on the meta device. "
            f"{IF_OFFLOADED}"
        )
    if call != "save_adapter":
        check_no_copies(modules, CALLS[call].doing)
    elif on_disk := modules_on_disk(modules):
        raise StateError(
            f"{CALLS[call].doing} needs tensors with values, and group offloading of diffusers has those of "
            f"{listing(on_disk, 3)} on the disk. {BEFORE}"
        )


def check_not_fused(model: nn.Module) -> None:
    """Refuses to change adapters on layers whose weights were copied into a fused projection, which is called instead.

    Raises:
        StateError: If an adapted projection of an attention was fused with others.
    """
    fused = {entry.name for entry in model_modules(model) if _is_fused(entry.module)}
    adapted = [name.rpartition(".") for name in adapted_layers(model)] if fused else []
    owners = dict.fromkeys(owner for owner, _, own in adapted if owner in fused and own in _FUSED)
    if owners:
        raise StateError(
            f"{listing(owners, 3)} compute with fused copies of their projections, which no adapter changes: "
            "unfuse_qkv_projections() first. Fuse them when adapters are merged for good."
        )


def _is_fused(module: nn.Module) -> bool:
    """Whether a module is an attention that computes with fused copies of its projections."""
    if not vars(module).get("fused_projections"):
        return False
    # Older classes are still marked when they are unfused, and have another processor then.
    return hasattr(module, "unfuse_projections") or "Fused" in type(getattr(module, "processor", None)).__name__


def check_not_sharded(model: nn.Module) -> None:
    """Refuses to add an adapter where each process holds a part of the tensors, which have to be whole.

    Raises:
        StateError: If parameters of the model are split over processes.
    """
    _check_whole(model, own_parameters(model_modules(model)), "add_adapter")


def _check_whole(model: nn.Module, names: Iterable[str], call: str) -> None:
    split = [name for name in names if is_shard(*holder_of(model, name))]
    if split:
        raise StateError(
            f"{CALLS[call].doing} needs whole tensors, and {listing(split, 3)} are split over processes. Do it before "
            "the model is sharded, with DeepSpeed inside of deepspeed.zero.GatheredParameters, or in a whole model "
            "that has loaded get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict."
        )
