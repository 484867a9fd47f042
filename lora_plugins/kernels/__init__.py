"""What adapted layers compute: operations in ordinary torch functions, and faster kernels for some of their calls.

An operation tries its kernels in turn. Those are the files of `entries`: each may be deleted, or switched off by name.
Other rooms import from here only; this one imports only `lora_plugins.utils` and `lora_plugins.errors`.
"""

from lora_plugins.kernels._switches import DISABLE_VARIABLE, KernelStatus, disabled_kernels, kernel_report
from lora_plugins.kernels.conv import lora_conv
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.linear import lora_linear
from lora_plugins.kernels.matmul import effective_weight, linear_2d, transposed_product
from lora_plugins.kernels.rescaled import direction_and_factors, lora_rescaled, rescaled_weight

__all__ = [
    "DISABLE_VARIABLE",
    "Geometry",
    "KernelStatus",
    "direction_and_factors",
    "disabled_kernels",
    "effective_weight",
    "kernel_report",
    "linear_2d",
    "lora_conv",
    "lora_linear",
    "lora_rescaled",
    "rescaled_weight",
    "transposed_product",
]
