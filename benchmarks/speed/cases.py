"""The models that are measured, with random weights: the time of a step does not depend on them."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One model and how it is adapted.

    Args:
        name: What the table calls it.
        make: Builds the model.
        inputs: Makes one batch.
        r: Rank.
        targets: Types of the adapted layers, or the ends of their names.
        channels_last: Whether model and batch have their channels last.
        checkpointing: Whether activations are computed again in the backward, block by block.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    r: int
    targets: tuple[str, ...] | tuple[type[nn.Module], ...]
    channels_last: bool = False
    checkpointing: bool = False

    @property
    def can_checkpoint(self) -> bool:
        """Whether the model has a switch for it."""
        return self.targets != (nn.Embedding,)

    def model(self) -> nn.Module:
        """The model in training mode, its norms in eval mode."""
        torch.manual_seed(0)
        model = self.make().train()
        norms_stand_still(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if self.checkpointing:
            model.set_grad_checkpointing(True)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def batch(self) -> tuple[Tensor, ...]:
        """One batch, which requires a gradient where it can."""
        torch.manual_seed(1)
        tensors = [x.contiguous(memory_format=torch.channels_last) if self.channels_last else x for x in self.inputs()]
        return tuple(x.requires_grad_(x.is_floating_point()) for x in tensors)

    def target_names(self, model: nn.Module) -> list[str]:
        """The full names of the adapted layers."""
        return [name for name, module in model.named_modules() if self._is_target(name, module)]

    def _is_target(self, name: str, module: nn.Module) -> bool:
        if isinstance(self.targets[0], str):
            return any(f".{name}".endswith(f".{end}") for end in self.targets)
        return isinstance(module, tuple(self.targets))


def norms_stand_still(model: nn.Module) -> None:
    """Puts batch norms into eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class Segmenter(nn.Module):
    """SegFormer, whose output is its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """As models of timm have it."""
        assert enable
        self.net.gradient_checkpointing_enable()

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits at a quarter of their size."""
        return self.net(x).logits


def images(batch: int, size: int) -> Inputs:
    """Batches of random images."""
    return lambda: (torch.randn(batch, 3, size, size),)


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    """A timm model with random weights."""
    return lambda: timm.create_model(name, pretrained=False, num_classes=100, **options)


VIT_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
DENSE = (nn.Linear, nn.Conv2d)


def vit(batch: int = 8, r: int = 16, depth: int = 12) -> Case:
    """ViT-S at 224 pixels."""
    make = timm_model("vit_small_patch16_224", depth=depth)
    return Case("ViT-S 224", make, images(batch, 224), r, VIT_LAYERS)


def vit_large() -> Case:
    """ViT-L at 224 pixels, for what is not a step."""
    return Case("ViT-L 224", timm_model("vit_large_patch16_224"), images(1, 224), 16, VIT_LAYERS)


def resnet(batch: int = 8, r: int = 8, *, channels_last: bool = False) -> Case:
    """ResNet-50 at 160 pixels."""
    name = "ResNet-50 160" + ", channels last" * channels_last
    return Case(name, timm_model("resnet50"), images(batch, 160), r, (nn.Conv2d,), channels_last)


CASES = {
    "vit": vit(),
    "resnet": resnet(),
    "resnet-channels_last": resnet(channels_last=True),
    "convnext": Case("ConvNeXt-T 128, channels last", timm_model("convnext_tiny"), images(8, 128), 8, DENSE, True),
    "efficientnet": Case(
        "EfficientNet-Lite0 160, channels last", timm_model("efficientnet_lite0"), images(8, 160), 8, DENSE, True
    ),
    "segformer": Case("SegFormer-B0 512", Segmenter, images(2, 512), 16, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "swin": Case("Swin-T 224", timm_model("swin_tiny_patch4_window7_224"), images(4, 224), 16, VIT_LAYERS),
    "embedding": Case(
        "Embedding 30,000 x 384",
        lambda: nn.Sequential(nn.Embedding(30_000, 384), nn.LayerNorm(384), nn.Linear(384, 384)),
        lambda: (torch.randint(30_000, (8, 512)),),
        16,
        (nn.Embedding,),
    ),
}
