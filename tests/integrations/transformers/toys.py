"""Small models of transformers, data for them, and runs of the trainer; nothing is downloaded."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import nn

from lora_plugins import LoraConfig
from lora_plugins.integrations.transformers import LoraTrainer

VIT = LoraConfig(r=2, alpha=8.0, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], dropout=0.1)
SEGFORMER = LoraConfig(
    r=2, target_modules=["q_proj", "v_proj", "fc1"], modules_to_save=["decode_head.classifier", "batch_norm"]
)

STORED = replace(VIT, quantize="nf4", quantize_options={"min_size": 0})
CENTERED = LoraConfig(r=2, target_modules=["hidden", "out"])
BEST = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}


class Center(nn.Module):
    """Takes the running mean of its inputs off them: a buffer moves in training, and no parameter is there."""

    momentum = 0.5

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), self.momentum)
        return x - self.mean


class Centered(nn.Module):
    """Random, and the same each time; with a `Center` in the middle."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.hidden, self.center, self.out = nn.Linear(192, 4), Center(), nn.Linear(4, 3)

    def forward(self, pixel_values, labels=None):
        scores = self.out(self.center(self.hidden(pixel_values.flatten(1))))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def vit(**fields):
    """Random, and the same each time."""
    torch.manual_seed(7)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3, **fields,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def build_vit():
    """A `model_init`, which the Trainer calls with a trial if it takes anything."""
    return vit()


def segformer():
    """Random, and the same each time; with a batch normalization in its head."""
    torch.manual_seed(7)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def images(count=12, seed=1):
    """Images of three classes that differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randn(count, 3, 8, 8, generator=generator) + (labels - 1.0).view(-1, 1, 1, 1)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]


def scenes(count=8):
    """Images whose classes are those of the brightness of their pixels."""
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = pixels.mean(1).sign().long() + 1
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def arguments(folder, kind=transformers.TrainingArguments, **fields):
    """Two epochs of three steps, a checkpoint after each epoch."""
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "epoch",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_strategy": "no",
    }  # fmt: skip
    return kind(str(folder), **{**settings, **fields})


def trainer(folder, model=None, config=VIT, data=None, **fields):
    """A trainer of the small ViT; fields of `LoraTrainer` are told from those of the arguments."""
    own = {
        "merge_on_train_end",
        "dequantize",
        "max_error",
        "adapter_name",
        "optimizers",
        "compute_metrics",
        "model_init",
        "callbacks",
    }
    options = {name: fields.pop(name) for name in own & fields.keys()}
    given = {} if "model_init" in options else {"model": vit() if model is None else model}
    sets = {"train_dataset": data or images(), "eval_dataset": data or images(6, seed=2)}
    return LoraTrainer(**given, args=arguments(folder, **fields), lora_config=config, **sets, **options)


def values(model):
    """Copies of all tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def files(folder):
    """The names in a folder."""
    return {path.name for path in Path(folder).iterdir()}


def differing(one, other):
    """The names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def logits(model, data=None):
    """What a model computes, in eval mode."""
    model.eval()
    with torch.no_grad():
        return model(pixel_values=torch.stack([each["pixel_values"] for each in data or images(6, seed=2)])).logits
