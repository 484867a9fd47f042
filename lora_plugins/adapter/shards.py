"""Models whose tensors FSDP or tensor parallelism of torch have split over processes: trained, and not changed."""

from torch import nn

from lora_plugins.adapter.lifecycle import CALLS
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import full_name, is_shard, model_modules


def check_not_sharded(model: nn.Module, call: str) -> None:
    """Refuses a call that needs whole tensors, of which each process has a part.

    Args:
        model: The model.
        call: Name of the call, as `lifecycle.CALLS` has it.

    Raises:
        StateError: If parameters of the model are split over processes.
    """
    split = [
        full_name(entry.name, name)
        for entry in model_modules(model)
        for name, parameter in entry.module._parameters.items()
        if parameter is not None and is_shard(entry.module, name)
    ]
    if split:
        raise StateError(
            f"{CALLS[call].doing} needs whole tensors, and {listing(split, 3)} are split over processes. Do it before "
            "the model is sharded, or in a whole model that has loaded get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict."
        )
