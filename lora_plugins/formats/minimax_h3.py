"""What files of MiniMax H3 have of their own."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.components import class_names
from lora_plugins.formats.diffusers_keys import adapter_name


def refuse_alternating_rows(keys: Iterable[str], model: nn.Module) -> None:
    """Refuses keys of projections whose rows are q, k and v of one head after the other.

    DiffSynth-Studio trains them so, and everybody else on all rows of q, then of k, then of v. Only the name of PEFT's
    adapter in the keys tells, and its reader in diffusers goes by that too.

    Raises:
        AdapterFileError: If the model is a MiniMax H3 and the file has such projections.
    """
    wrong = [key for key in keys if ".attn.qkv_proj.lora_" in key and adapter_name(key) is not None]
    if wrong and _has_minimax_h3(model):
        raise AdapterFileError(
            f"{listing(sorted(wrong), 3)}: DiffSynth-Studio trains these with the rows of q, k and v of one head after "
            "the other, which has no form here. diffusers puts them in order, where the adapter is called 'default' "
            "in the keys: save what MiniMaxH3LoraLoaderMixin.lora_state_dict(path) returns by save_file of "
            "safetensors, and load that."
        )


def alpha_of_all(metadata: Mapping[str, str], keys: Collection[str], model: nn.Module | None) -> float | None:
    """Returns the alpha of all layers that headers of some files say; None where there is none, or no model.

    As diffusers, which reads it for no other model, not if it is no number, and not beside alphas of layers.
    """
    if model is None or any(key.endswith(".alpha") for key in keys) or not _has_minimax_h3(model):
        return None
    try:
        return float(metadata["alpha"])
    except (KeyError, ValueError):
        return None


def _has_minimax_h3(model: nn.Module) -> bool:
    return any("MiniMaxH3Transformer3DModel" in class_names(each) for each in model.modules())
