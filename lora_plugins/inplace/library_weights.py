"""Weights that other libraries quantized: read as dense values, never written.

bitsandbytes' `Linear4bit` and `Linear8bitLt`, the tensors of torchao, and those of GGUF files in diffusers. They are
told by the names of their types, so that no library is imported. What a weight of theirs cannot do is said by
`foreign_problem`, while planning.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.inplace.layer_state import base_class_of
from lora_plugins.inplace.modules import submodule
from lora_plugins.utils import ending


@dataclass(frozen=True)
class Foreign:
    """One kind of quantized weights.

    Args:
        title: What messages call it.
        dense: Returns the dense value of a weight of a layer.
        dtype: Returns the type of that value.
        problem: Says why updates cannot be added to it; empty if they can.
        forward: Computes what the layer does, with the dense weight that it answers with and an input of its type; None
            where the layer's own forward does so.
        dense_class: The class that the layer has once its weight is dense; None for its own.
        held: Attributes that the layer has other values of while its model is adapted.
        breaks: Whether a weight with a problem makes a backward through the layer wrong, adapted or not.
    """

    title: str
    dense: Callable[[Any, Any], Tensor]
    dtype: Callable[[Any, Any], torch.dtype]
    problem: Callable[[Any, Any], str]
    forward: Callable[..., Tensor] | None = None
    dense_class: type[nn.Module] | None = None
    held: tuple[tuple[str, Any], ...] = ()
    breaks: bool = False


def foreign_kind(value: object) -> Foreign | None:
    """Returns the kind of a quantized weight; None for a weight that is dense."""
    if type(value) in (nn.Parameter, Tensor):
        return None
    cls = type(value)
    if cls.__module__.partition(".")[0] == "torchao":
        return _TORCHAO
    return _KINDS.get(f"{cls.__module__}.{cls.__name__}")


def foreign_weights(layer: nn.Module) -> dict[str, Foreign]:
    """Returns the kinds of a layer's quantized weights by attribute name; empty for most layers."""
    found = {name: foreign_kind(value) for name, value in layer._parameters.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def foreign_problem(layer: nn.Module, name: str) -> str:
    """Says why updates cannot be added to a weight that another library quantized; empty if they can."""
    if base_class_of(layer).__module__.startswith(_QUANTO):
        return (
            "is one of quanto, whose layers quantize what they read in each forward, the update included; use "
            "LoraConfig.quantize, bitsandbytes or torchao, or exclude the layer"
        )
    value = layer._parameters.get(name)
    kind = foreign_kind(value)
    return "" if kind is None else kind.problem(layer, value)


def hold(layer: nn.Module) -> None:
    """Keeps the library from making the weights of a layer unreadable while its model is adapted."""
    for kind in foreign_weights(layer).values():
        for name, value in kind.held:
            if name in layer.__dict__ and _held(name) not in layer.__dict__:
                layer.__dict__[_held(name)] = layer.__dict__[name]
                layer.__dict__[name] = value


def let_go(layer: nn.Module) -> None:
    """Undoes `hold`."""
    for key in [key for key in layer.__dict__ if key.startswith(_HELD)]:
        layer.__dict__[key.removeprefix(_HELD)] = layer.__dict__.pop(key)


@contextmanager
def as_its_own(layer: nn.Module, base: Any) -> Iterator[None]:
    """Gives a layer a class that reads what it stores, as the one of its library, for the duration of the block."""
    with ending(partial(setattr, layer, "__class__", type(layer))):
        layer.__class__ = base
        yield


_HELD = "_lora_held_"

_QUANTO = "optimum.quanto"
_QUANTIZER = "hf_quantizer"
_MARKS = (_QUANTIZER, "quantization_method", "is_quantized", "_weight_conversions")
_CONFIG_MARKS = ("quantization_config",)


def _held(name: str) -> str:
    return _HELD + name


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


def _dense_8_bits(layer: Any, weight: Any) -> Tensor:
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    dense: Tensor = (weight.data.float() * (scales.float()[:, None] / 127)).to(_dtype_8_bits(layer, weight))
    return dense


def _dtype_8_bits(layer: Any, weight: Any) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if layer.bias is None else layer.bias.dtype  # its own is known to nobody
    return dtype


def _problem_8_bits(layer: Any, weight: Any) -> str:
    if weight.has_fp16_weights:
        return "keeps values of 16 bits, which are quantized in the forward; make it with has_fp16_weights=False"
    if weight.data.dtype != torch.int8 or (weight.SCB is None and layer.state.SCB is None):
        return "is not quantized yet; move the model to its device first, and adapt it then"
    return ""


def _dense_gguf(layer: Any, weight: Any) -> Tensor:
    utilities: Any = sys.modules[type(weight).__module__]  # of diffusers, which made the weight
    dense: Tensor = utilities.dequantize_gguf_tensor(weight).to(layer.compute_dtype)
    return dense


def _dtype_gguf(layer: Any, weight: Any) -> torch.dtype:
    dtype: torch.dtype = layer.compute_dtype
    return dtype


def _problem_gguf(layer: Any, weight: Any) -> str:
    if not isinstance(getattr(layer, "compute_dtype", None), torch.dtype):
        return "is one of GGUF in a layer that is not diffusers' GGUFLinear, and has no type to compute in"
    return ""


def _linear(layer: Any, x: Tensor) -> Tensor:
    """What a linear layer of these libraries computes, with the dense weight that it answers with."""
    weight = layer.weight
    return F.linear(x, weight, None if layer.bias is None else layer.bias.to(weight.dtype))


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


_TORCHAO = Foreign("torchao", _dense_torchao, _own_dtype, _problem_torchao)

_KINDS = {
    "bitsandbytes.nn.modules.Params4bit": Foreign(
        "bitsandbytes, 4 bits",
        _dense_4_bits,
        _dtype_4_bits,
        _problem_4_bits,
        _linear,
        nn.Linear,
        (("support_avx512bf16_for_cpu", False),),
        breaks=True,
    ),
    "bitsandbytes.nn.modules.Int8Params": Foreign(
        "bitsandbytes, 8 bits", _dense_8_bits, _dtype_8_bits, _problem_8_bits, _linear, nn.Linear
    ),
    "diffusers.quantizers.gguf.utils.GGUFParameter": Foreign(
        "GGUF", _dense_gguf, _dtype_gguf, _problem_gguf, _linear, nn.Linear
    ),
}
"""Kinds by the import path of their type."""


def put_dense_foreign(layer: nn.Module, name: str, value: Tensor | None = None) -> None:
    """Replaces a weight that another library quantized by a parameter.

    Args:
        layer: The layer, without adapters or about to lose them.
        name: Attribute name of the weight.
        value: Its value from now on; by default the dense one that it has.
    """
    weight: Any = layer._parameters[name]
    kind = foreign_kind(weight)
    assert kind is not None
    with torch.no_grad():
        dense = kind.dense(layer, weight) if value is None else value
    layer._parameters[name] = nn.Parameter(dense, requires_grad=False)
    if kind.dense_class is not None:
        layer.__class__ = kind.dense_class


@dataclass(frozen=True)
class LibraryWeight:
    """A weight that another library quantized, and what its layer was with it.

    Args:
        weight: The weight.
        layer_class: The class of the layer, without adapters.
        dense: Makes the dense value.
    """

    weight: nn.Parameter
    layer_class: type[nn.Module]
    dense: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense value."""
        return self.dense().shape

    def put(self, layer: nn.Module, name: str) -> None:
        """Puts it back into a layer without adapters, in place of a dense one and on its device."""
        dense = layer._parameters[name]
        assert dense is not None
        moved = self.weight if self.weight.device == dense.device else self.weight.to(dense.device)
        layer._parameters[name] = cast(nn.Parameter, moved)
        layer.__class__ = self.layer_class


def library_weights(layer: nn.Module) -> dict[str, LibraryWeight]:
    """Returns a layer's weights that other libraries quantized, to be put back later; empty for most layers."""

    def kept(name: str, kind: Foreign) -> LibraryWeight:
        weight: Any = layer._parameters[name]
        return LibraryWeight(weight, base_class_of(layer), torch.no_grad()(partial(kind.dense, layer, weight)))

    return {name: kept(name, kind) for name, kind in foreign_weights(layer).items()}


Marks = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""By name of a model, what says how it is quantized: attributes of its own, and of its config."""


def quantizer_marks(model: nn.Module) -> Marks:
    """Returns what models of transformers and diffusers record about their quantization."""

    def of(held: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {name: held[name] for name in names if name in held}

    return {
        name: (of(module.__dict__, _MARKS), of(vars(module.config), _CONFIG_MARKS))
        for name, module in model.named_modules()
        if (quantizer := module.__dict__.get(_QUANTIZER)) is not None
        if quantizer.quantization_config.quant_method in ("bitsandbytes", "torchao", "gguf")
    }


def put_marks(model: nn.Module, marks: Marks) -> None:
    """Restores what models of transformers and diffusers record about their quantization."""
    for name, (own, of_config) in marks.items():
        module: Any = submodule(model, name)
        module.__dict__.update(own)
        vars(module.config).update(of_config)
        if isinstance(module.config, OrderedDict):
            OrderedDict.update(module.config, of_config)


def forget_quantizers(model: nn.Module) -> None:
    """Removes what models of transformers and diffusers record about their quantization: they load as dense ones."""
    for name in quantizer_marks(model):
        module: Any = submodule(model, name)
        for mark in _MARKS:
            module.__dict__.pop(mark, None)
        module.is_quantized = False
        for mark in _CONFIG_MARKS:
            vars(module.config).pop(mark, None)
            if isinstance(module.config, OrderedDict) and mark in module.config:
                OrderedDict.__delitem__(module.config, mark)  # that of diffusers' own class refuses all changes
