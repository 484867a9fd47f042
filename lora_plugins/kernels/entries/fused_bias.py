"""Large products in bfloat16 with a bias, by oneDNN on a CPU.

torch calls oneDNN for them, too, but first copies the bias to every row of the output and then has the product added to
that: products of a ViT-S took 1.08 to 1.26 of those without a bias, where oneDNN's own bias took 1.00 to 1.03 (two
cores of an AMD EPYC, Zen 5).
"""

import torch
from torch import Tensor

from lora_plugins.kernels._kernel import Kernel, missing_from_torch
from lora_plugins.kernels._onednn import linear_2d, takes, unavailable


def _available() -> str:
    missing = unavailable() or missing_from_torch("ops.mkldnn._is_mkldnn_bf16_supported")
    if missing or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return missing
    return "oneDNN has no products in bfloat16 on this processor"


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return bias is not None and takes(torch.bfloat16, x, weight, bias)


KERNELS = (Kernel("fused_bias", "linear_2d", _available, _suits, linear_2d),)
