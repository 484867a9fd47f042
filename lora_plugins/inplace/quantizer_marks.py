"""What models of transformers and diffusers record about their quantization: gone while their weights are dense."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_plugins.inplace.modules import submodule

_QUANTIZER = "hf_quantizer"
_MARKS = (_QUANTIZER, "quantization_method", "is_quantized", "_weight_conversions")
_CONFIG_MARKS = ("quantization_config",)

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
