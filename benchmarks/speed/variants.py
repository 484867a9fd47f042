"""The variants that are compared: each takes a case and gives a model ready for a step."""

import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.speed.cases import Case, norms_stand_still
from lora_plugins import LoraConfig, LoraModel, TargetError


def floor(case: Case, dropout: float) -> nn.Module:
    """The frozen base."""
    return case.model().requires_grad_(False)


def full(case: Case, dropout: float) -> nn.Module:
    """Full fine-tuning."""
    return case.model()


def ours(case: Case, dropout: float, **fields: object) -> nn.Module:
    """This project."""
    model = case.model()
    names = case.target_names(model)
    drops = dropout if not any(isinstance(model.get_submodule(name), nn.Embedding) for name in names) else 0.0
    LoraModel(model, LoraConfig(r=case.r, alpha=case.r, dropout=drops, target_modules=names, **fields))
    return shaken(model)


def ours_low(case: Case, dropout: float) -> nn.Module:
    """This project with `memory="low"`."""
    return ours(case, dropout, memory="low")


def peft(case: Case, dropout: float, **fields: object) -> nn.Module:
    """PEFT's LoRA."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = case.model()
    names = case.target_names(model)
    config = PeftConfig(r=case.r, lora_alpha=case.r, lora_dropout=dropout, target_modules=names, **fields)
    return shaken(get_peft_model(model, config).train())


def ours_of_many(case: Case, adapters: Sequence[str]) -> LoraModel:
    """This project, with random adapters of these names, for inference."""
    model = case.model().eval().requires_grad_(False)
    config = LoraConfig(r=case.r, target_modules=case.target_names(model), init="none")
    lora = LoraModel(model, config, adapters[0])
    for name in adapters[1:]:
        lora.add_adapter(name, config)
    return lora


def peft_of_many(case: Case, adapters: Sequence[str]) -> nn.Module | None:
    """The same by PEFT; None where it is not installed."""
    if "peft" not in installed():
        return None
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = case.model().eval()
    config = PeftConfig(r=case.r, target_modules=case.target_names(model), init_lora_weights=False)
    adapted: nn.Module = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        adapted.add_adapter(name, config)
    return adapted.eval()


def dora(case: Case, dropout: float) -> nn.Module:
    """This project's DoRA."""
    return ours(case, dropout, variant="dora")


def peft_dora(case: Case, dropout: float) -> nn.Module:
    """PEFT's DoRA."""
    return peft(case, dropout, use_dora=True)


def loralib(case: Case, dropout: float) -> nn.Module:
    """The reference implementation; it has linear layers and embeddings, so it is left out elsewhere."""
    import loralib as reference

    model = case.model()
    for name in case.target_names(model):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise NotImplementedError(f"loralib has no layer for {type(layer).__name__}")
        twin = reference.Linear(
            layer.in_features, layer.out_features, case.r, lora_dropout=dropout, bias=layer.bias is not None
        )
        model.set_submodule(name, twin)
    reference.mark_only_lora_as_trainable(model)
    return shaken(model.train())


def shaken(model: nn.Module) -> nn.Module:
    """Gives the tensors of the adapter random values, as after some steps, and the norms their eval mode again."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.numel()))
    norms_stand_still(model)
    return model


VARIANTS: dict[str, Callable[[Case, float], nn.Module]] = {
    "floor": floor,
    "full": full,
    "ours": ours,
    "ours, low memory": ours_low,
    "peft": peft,
    "ours, DoRA": dora,
    "peft, DoRA": peft_dora,
    "loralib": loralib,
}
TABLE = ("floor", "full", "peft", "ours", "ours, low memory")
"""The variants of the table."""


_OWN = ("floor", "full", "ours")


def installed() -> list[str]:
    """The variants whose library is here."""
    libraries = {name: name.partition(",")[0] for name in VARIANTS}
    return [name for name in VARIANTS if libraries[name] in _OWN or importlib.util.find_spec(libraries[name])]


def build(name: str, case: Case, dropout: float, device: torch.device) -> nn.Module | None:
    """Returns a variant of a case; None if its library refuses the model."""
    try:
        return VARIANTS[name](case, dropout).to(device)
    except (NotImplementedError, ValueError, TargetError):
        return None
