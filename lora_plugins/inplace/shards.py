"""Weights that are split over processes: by FSDP, FSDP2 or DeepSpeed's ZeRO-3."""

from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.inplace.layer_state import layer_state
from lora_plugins.inplace.weights import own_parameter


def is_shard(layer: nn.Module, name: str) -> bool:
    """Whether a weight is split over processes."""
    parameter = own_parameter(layer, name)
    return is_distributed(parameter) or is_kept_in_parts(layer, name) or _is_partitioned(parameter)


def is_kept_in_parts(layer: nn.Module, name: str) -> bool:
    """Whether FSDP or FSDP2 holds a weight in parts, as both do outside of the forward of what they wrap.

    They take their parts by `getattr(layer, name)` and keep what they get: that has to be the parameter. Of what is
    none, a buffer or a weight that is computed, it is whether they hold the update in parts.
    """
    if "_is_fsdp_managed_module" not in layer.__dict__:  # what both say of all modules below them
        return False
    parameter = own_parameter(layer, name)
    if is_distributed(parameter):
        return True
    # FSDP marks its parameters, and puts views in their place for a forward; FSDP2 puts whole parameters there.
    if parameter is not None:
        return hasattr(parameter, "_fsdp_flattened")
    view = layer.__dict__.get(name)
    if view is not None:
        _check_not_shared(layer, name, view)
    if view is not None and view.untyped_storage().size() == 0:
        return True
    factors = [child for child in layer._modules.values() if isinstance(child, AdapterTensors)]
    parts = [part for each in factors for part in each._parameters.values()]
    return any(is_distributed(part) or hasattr(part, "_fsdp_flattened") for part in parts)


def is_distributed(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, whose import is too slow for those who do not use it."""
    return hasattr(tensor, "placements")


def _is_partitioned(parameter: nn.Parameter | None) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken the values of a parameter, which keeps its shape beside it."""
    return parameter is not None and hasattr(parameter, "ds_shape") and parameter.shape != parameter.ds_shape


def _check_not_shared(layer: nn.Module, name: str, view: Tensor) -> None:
    """Refuses a weight that several modules share under FSDP, which gives the others what reading this one gives.

    Raises:
        StateError: If it is one.
    """
    shared = getattr(view._base, "_shared_param_infos", ())
    if any(info.prim_module is layer and info.prim_param_name == name for info in shared):
        raise StateError(
            f"{name!r} of {layer_state(layer).name!r} is shared with another module, which FSDP would give the updated "
            "weight for its own. Untie the two, exclude the layer, or use FSDP2 (fully_shard)."
        )
