"""AdaLoRA of PEFT (Zhang et al., arXiv 2303.10512) as LoRA: its singular values are multiplied into A.

Training takes ranks away from layers, and may leave one none.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.utils import common_type, single_at_least

METHOD = "ADALORA"

IDLE = frozenset(["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"])
"""The fields of its config that LoRA's does not have."""

UNUSED = frozenset(["r", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"])
"""The fields that it does not use. Its `rank_pattern` says which ranks it kept; the file has no others."""

_KEY = re.compile(r"(.+)\.lora_([ABE])(?:\.default)?")


def divisor(first_rank: int) -> float:
    """Returns what PEFT divides alpha by in every layer, whatever its rank is now."""
    return first_rank + 1e-5


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a file by the keys of LoRA's. A layer without a rank has one of zeros.

    Raises:
        AdapterFileError: If a layer lacks one of its tensors, or has one of another shape.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            found[key] = tensor
        else:
            layers.setdefault(match[1], {})[match[2]] = tensor
    if lacking := [name for name, factors in layers.items() if factors.keys() != {*"ABE"}]:
        raise AdapterFileError(
            f"{listing(lacking)} lacks lora_A, lora_B or lora_E, which each layer of AdaLoRA has. Copy the file again."
        )
    for name, factors in layers.items():
        A, B, values = factors["A"], factors["B"], factors["E"]
        if A.dim() != 2 or B.dim() != 2 or values.shape != (len(A), 1):
            shapes = ", ".join(f"lora_{key} {tuple(tensor.shape)}" for key, tensor in factors.items())
            raise AdapterFileError(
                f"{name!r} has {shapes}: AdaLoRA has (r, in), (out, r) and (r, 1). Copy the file again."
            )
        if len(A) == 0:
            A, B, values = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1), values.new_zeros(1, 1)
        wide = single_at_least(common_type(A.dtype, values.dtype))  # a product in half precision is rounded
        found |= {f"{name}.lora_A.weight": A.to(wide) * values.to(wide), f"{name}.lora_B.weight": B}
    return found
