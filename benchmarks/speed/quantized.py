"""What a base in 4 or 8 bits costs and saves: step, state and what is kept, beside float LoRA and PEFT on bitsandbytes.

python -m benchmarks.speed.quantized --batch 8 --rounds 15 --threads 1
python -m benchmarks.speed.quantized --model resnet50 --target all

bitsandbytes quantizes linear layers only: convolutions are float ones beside PEFT.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.speed.cases import norms_stand_still
from benchmarks.speed.measure import kept_bytes, ratio, seconds
from lora_plugins import LoraConfig, LoraModel

MIB = 2**20
TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
HEADS = ("head", "fc", "classifier")

Adapt = Callable[[nn.Module, list[str], list[str]], nn.Module]
"""Adapts the layers of these names, and trains those of the second list in full."""


def _ours(quantize: str | None) -> Adapt:
    def adapt(model: nn.Module, targets: list[str], heads: list[str]) -> nn.Module:
        LoraModel(model, LoraConfig(r=8, target_modules=targets, modules_to_save=heads, quantize=quantize))
        return model

    return adapt


def _peft(model: nn.Module, targets: list[str], heads: list[str]) -> nn.Module:
    """PEFT on `Linear4bit` of bitsandbytes, whose weights are replaced by hand as transformers does."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and name in targets:
            new = Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
            new.load_state_dict(layer.state_dict())
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new.to(layer.weight.device))
    config = PeftConfig(r=8, lora_alpha=8, target_modules=targets, modules_to_save=heads)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _layers(model: nn.Module, ends: list[str]) -> list[str]:
    """Returns the names of the layers that end so; all linear and convolutional ones for `all`."""
    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    if ends == ["all"]:
        return [name for name in names if not name.startswith(HEADS)]
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]


VARIANTS: dict[str, Adapt] = {
    "float": _ours(None),
    "nf4": _ours("nf4"),
    "int8": _ours("int8"),
    "peft + bitsandbytes nf4": _peft,
}


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.quantized")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--target", nargs="+", default=TARGETS, help="ends of names of layers; all for every one")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype, models = getattr(torch, options.dtype), {}
    for name in options.variant:
        torch.manual_seed(0)
        model = timm.create_model(options.model).to(options.device, dtype).train()
        norms_stand_still(model)
        model.set_grad_checkpointing(options.checkpointing)
        heads = [head for head in HEADS if hasattr(model, head)]
        models[name] = VARIANTS[name](model, _layers(model, options.target), heads)
    batch = (torch.randn(options.batch, 3, 224, 224, device=options.device, dtype=dtype),)
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    times = seconds(models, batch, options.rounds)
    table = Table("base", "state (MiB)", "kept (MiB)", "step (ms)", "step / float")
    for name, model in models.items():
        state = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        share = f"{ratio(times, name, 'float'):.2f}" if "float" in times else ""
        step = f"{1000 * median(times[name]):.0f}"
        table.add_row(name, f"{state / MIB:.1f}", f"{kept[name] / MIB:.1f}", step, share)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
