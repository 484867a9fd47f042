"""The kinds of weights that other libraries quantize: bitsandbytes, torchao, and GGUF files in diffusers.

They are told by the names of their types, so that no library is imported.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Foreign:
    """One kind of quantized weights.

    Args:
        title: What messages call it.
        dense_values: Returns the dense value of a weight of a layer, in any type.
        own_dtype: Returns the type of that value in a layer without a bias.
        problem: Says why updates cannot be added to it; empty if they can.
        elements: Returns how many values a weight has once it is dense.
        forward: Computes what the layer does, with the dense weight that it answers with and an input of its type; None
            where the layer's own forward does so.
        dense_class: The class that the layer has once its weight is dense; None for its own.
        pinned: Attributes of the layer, and the values that they have while its model is adapted: with these its
            library leaves the weight readable.
        breaks: Whether a weight with a problem makes a backward through the layer wrong, adapted or not.
    """

    title: str
    dense_values: Callable[[Any, Any], Tensor]
    own_dtype: Callable[[Any, Any], torch.dtype]
    problem: Callable[[Any, Any], str]
    elements: Callable[[Any], int]
    forward: Callable[..., Tensor] | None = None
    dense_class: type[nn.Module] | None = None
    pinned: tuple[tuple[str, Any], ...] = ()
    breaks: bool = False

    def dense(self, layer: Any, weight: Any) -> Tensor:
        """Returns the dense value of a weight of a layer."""
        return self.dense_values(layer, weight).to(self.dtype(layer, weight))

    def dtype(self, layer: Any, weight: Any) -> torch.dtype:
        """Returns the type of the dense value: that of the bias, which is added to its product."""
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor) and bias.is_floating_point() and foreign_kind(bias) is None:
            return bias.dtype
        return self.own_dtype(layer, weight)


def foreign_kind(value: object) -> Foreign | None:
    """Returns the kind of a quantized weight; None for a weight that is dense."""
    if type(value) in (nn.Parameter, Tensor):
        return None
    cls = type(value)
    if cls.__module__.partition(".")[0] == "torchao":
        return _TORCHAO
    return _KINDS.get(f"{cls.__module__}.{cls.__name__}")


def put_class_back(value: object) -> None:
    """Gives a quantized weight that was pickled its class again: pickle keeps its attributes, but not the class."""
    if type(value) is not nn.Parameter:
        return
    for mark, path in _MARKS.items():
        if mark in value.__dict__:
            module, _, name = path.rpartition(".")
            value.__class__ = getattr(sys.modules[module], name)  # where the class of its layer is, too


def _dense_4_bits(layer: Any, weight: Any) -> Tensor:
    functional: Any = sys.modules["bitsandbytes.functional"]  # of whoever made the weight
    dense: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense


def _dtype_4_bits(layer: Any, weight: Any) -> torch.dtype:
    dtype: torch.dtype = weight.quant_state.dtype
    return dtype


def _problem_4_bits(layer: Any, weight: Any) -> str:
    if weight.quant_state is None:
        return "is not quantized yet; move the model to its device first, and adapt it then"
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        return (
            "was packed anew by a forward of bitsandbytes in eval mode on a CPU, and cannot be read any more; load the "
            "model again, and adapt it before it is run"
        )
    return ""


def _elements_4_bits(weight: Any) -> int:
    shape = weight.shape if weight.quant_state is None else weight.quant_state.shape
    return math.prod(shape)


def _dense_8_bits(layer: Any, weight: Any) -> Tensor:
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    scales = scales.float().to(weight.device)  # which a move of the whole model leaves behind
    dense: Tensor = weight.data.float() * (scales[:, None] / 127)
    return dense


def _dtype_8_bits(layer: Any, weight: Any) -> torch.dtype:
    return torch.float32  # its own is known to nobody


def _problem_8_bits(layer: Any, weight: Any) -> str:
    if weight.has_fp16_weights:
        return "keeps values of 16 bits, which are quantized in the forward; make it with has_fp16_weights=False"
    if weight.data.dtype != torch.int8 or (weight.SCB is None and layer.state.SCB is None):
        return "is not quantized yet; move the model to its device first, and adapt it then"
    return ""


def _dense_gguf(layer: Any, weight: Any) -> Tensor:
    utilities: Any = sys.modules[type(weight).__module__]  # of diffusers, which made the weight
    dense: Tensor = utilities.dequantize_gguf_tensor(weight)
    return dense


def _dtype_gguf(layer: Any, weight: Any) -> torch.dtype:
    dtype: torch.dtype = layer.compute_dtype
    return dtype


def _problem_gguf(layer: Any, weight: Any) -> str:
    if not isinstance(getattr(layer, "compute_dtype", None), torch.dtype):
        return "is one of GGUF in a layer that is not diffusers' GGUFLinear, and has no type to compute in"
    return ""


def _elements_gguf(weight: Any) -> int:
    return math.prod(weight.quant_shape)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """Computes what a linear layer of these libraries does, with the dense weight that it answers with."""
    return F.linear(x, layer.weight, layer.bias)


def _dense_torchao(layer: Any, weight: Any) -> Tensor:
    dense: Tensor = weight.dequantize() if hasattr(weight, "dequantize") else weight.get_original_weight()
    return dense


def _own_dtype(layer: Any, weight: Any) -> torch.dtype:
    dtype: torch.dtype = weight.dtype
    return dtype


def _problem_torchao(layer: Any, weight: Any) -> str:
    dynamic = any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))
    if dynamic or "Activation" in type(weight).__name__:
        return (
            f"is a {type(weight).__name__} of torchao that quantizes inputs too, which has no gradient to the input; "
            "quantize weights only, such as by Int8WeightOnlyConfig, or exclude the layer"
        )
    try:
        with torch.no_grad():
            dense = _dense_torchao(layer, weight)
    except Exception as error:  # of a type that we do not know
        return f"is a {type(weight).__name__} of torchao that cannot be made dense ({type(error).__name__}: {error})"
    return "" if type(dense) is Tensor else f"is a {type(weight).__name__} of torchao that cannot be made dense"


_TORCHAO = Foreign("torchao", _dense_torchao, _own_dtype, _problem_torchao, torch.numel)

_MARKS = {"quant_state": "bitsandbytes.nn.modules.Params4bit", "SCB": "bitsandbytes.nn.modules.Int8Params"}
"""Attributes that only one kind has, with the import path of its type."""

_KINDS = {
    "bitsandbytes.nn.modules.Params4bit": Foreign(
        "bitsandbytes, 4 bits",
        _dense_4_bits,
        _dtype_4_bits,
        _problem_4_bits,
        _elements_4_bits,
        _linear,
        nn.Linear,
        (("support_avx512bf16_for_cpu", False),),
        breaks=True,
    ),
    "bitsandbytes.nn.modules.Int8Params": Foreign(
        "bitsandbytes, 8 bits", _dense_8_bits, _dtype_8_bits, _problem_8_bits, torch.numel, _linear, nn.Linear
    ),
    "diffusers.quantizers.gguf.utils.GGUFParameter": Foreign(
        "GGUF", _dense_gguf, _dtype_gguf, _problem_gguf, _elements_gguf, _linear, nn.Linear
    ),
}
"""Kinds by the import path of their type."""
